// Reads the structures of launchers.h from keyword arguments: each field must be there, and none may be left over. Pointers
// are integers (0: null), lists are Python lists, structures in a list are dicts.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <type_traits>

#include "launchers.h"

namespace mcld {

class Fields {
 public:
  explicit Fields(const pybind11::dict& arguments) : arguments_(arguments) {}

  // Called by a structure's `visit`: the names of MCLD_FIELDS as one text, and the members.
  template <class... Members> void operator()(const char* names, Members&... members) {
    std::string_view rest(names);
    (read(next(rest), members), ...);
  }

  template <class T> T take(const std::string& name) {
    T value;
    read(name, value);
    return value;
  }
  // A field that may be missing; null then.
  pybind11::handle optional(const char* name) {
    const pybind11::handle value = PyDict_GetItemString(arguments_.ptr(), name);
    if (value) ++used_;
    return value;
  }
  cudaStream_t stream() {
    void* stream;
    read("stream", stream);
    return static_cast<cudaStream_t>(stream);
  }
  void done() const {
    if (used_ != arguments_.size()) {
      throw pybind11::type_error("unknown arguments among " + std::string(pybind11::str(arguments_)));
    }
  }

 private:
  template <class T> void read(const std::string& name, T*& member) {
    member = reinterpret_cast<T*>(static_cast<uintptr_t>(get(name).cast<uint64_t>()));
  }
  template <class T> void read(const std::string& name, T& member) { member = get(name).cast<T>(); }
  template <class T, size_t kCount> void read(const std::string& name, T (&member)[kCount]) {
    const auto values = get(name).cast<std::array<T, kCount>>();
    std::copy(values.begin(), values.end(), member);
  }
  template <class T, int kMost> void read(const std::string& name, List<T, kMost>& member) {
    const auto items = get(name).cast<pybind11::sequence>();
    member.count = int(items.size());
    if (member.count < 1 || member.count > kMost) {
      throw pybind11::value_error(name + " takes 1 to " + std::to_string(kMost) + " items");
    }
    for (int i = 0; i < member.count; ++i) read_item(items[i], member.item[i]);
  }

  template <class T> static void read_item(const pybind11::object& value, T& item) {
    if constexpr (std::is_arithmetic_v<T>) {
      item = value.cast<T>();
    } else {
      const pybind11::dict arguments = value;
      Fields fields(arguments);
      item.visit(fields);
      fields.done();
    }
  }

  // The first of the names, separated by ", " or a line break's spaces, taken off the text.
  static std::string next(std::string_view& names) {
    const size_t end = std::min(names.find(','), names.size());
    const std::string name(names.substr(0, end));
    names.remove_prefix(std::min(names.find_first_not_of(", \n", end), names.size()));
    return name;
  }

  pybind11::handle get(const std::string& name) {
    const pybind11::handle value = PyDict_GetItemString(arguments_.ptr(), name.c_str());
    if (!value) throw pybind11::type_error("missing argument " + name);
    ++used_;
    return value;
  }

  const pybind11::dict& arguments_;
  size_t used_ = 0;
};

// Calls function(address of the member) for each pointer in a structure, also in its lists and their structures.
template <class Function> class PointersOf {
 public:
  explicit PointersOf(Function function) : function_(function) {}
  template <class... Members> void operator()(const char*, Members&... members) { (take(members), ...); }

 private:
  template <class T> void take(T*& member) { function_(static_cast<void*>(&member)); }
  template <class T, int kMost> void take(List<T, kMost>& member) {
    if constexpr (!std::is_arithmetic_v<T>) {
      for (int i = 0; i < member.count; ++i) member.item[i].visit(*this);
    }
  }
  template <class T> void take(T&) {}

  Function function_;
};

// The keyword arguments of a structure, in the order of its MCLD_FIELDS.
class FieldNames {
 public:
  template <class... Members> void operator()(const char* names, Members&...) { text_ = names; }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace mcld
