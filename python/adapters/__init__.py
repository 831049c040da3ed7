"""The losses inside other people's trainers: a short file a framework, which imports nothing from its siblings.

Copy the file beside your script, or put this repository's ``python/`` on the path. Each takes any loss module with the
call ``loss(student, teacher, target)``: all of mcld_kernels, and others.
"""
