def mcld(inputs, budget):
    return None
