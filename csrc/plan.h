// A recorded sequence of launches that runs again on other tensors: the host side of a call without its Python.
//
// The launchers append to a plan while a call runs for the first time. A pointer in their arguments is then looked up among
// the tensors of the call, and becomes an offset from one of a few bases: inputs, outputs, one workspace. `run` adds new
// bases and launches, in the recorded order. A plan does not change once it is placed, so threads can share it.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fields.h"

namespace mcld {

// Memory of a recorded call: `bytes` from `begin` are those from `offset` of base number `base`.
struct Range {
  uint64_t begin, bytes;
  int base;
  uint64_t offset;
};

class Plan {
 public:
  // launch(structure, stream)
  template <class Structure, class Launch> void append(const Structure& structure, Launch launch) {
    Step step;
    Structure copy = structure;
    PointersOf pointers([&](void* member) {
      Pointer pointer{size_t(static_cast<char*>(member) - reinterpret_cast<char*>(&copy)), 0, -1};
      std::memcpy(&pointer.value, member, sizeof pointer.value);
      if (pointer.value) step.pointers.push_back(pointer);
    });
    copy.visit(pointers);
    step.launch = [copy, launch](const Step& step, const std::vector<uint64_t>& bases, cudaStream_t stream) {
      Structure placed = copy;
      for (const Pointer& pointer : step.pointers) {
        const uint64_t address = bases[size_t(pointer.base)] + pointer.value;
        std::memcpy(reinterpret_cast<char*>(&placed) + pointer.member, &address, sizeof address);
      }
      launch(placed, stream);
    };
    steps_.push_back(std::move(step));
  }

  // Throws std::invalid_argument for a pointer into none of the ranges.
  void place(const std::vector<Range>& ranges) {
    for (Step& step : steps_) {
      for (Pointer& pointer : step.pointers) {
        const auto range = std::find_if(ranges.begin(), ranges.end(), [&](const Range& range) {
          return pointer.value >= range.begin && pointer.value - range.begin < range.bytes;
        });
        if (range == ranges.end()) throw std::invalid_argument("a launch has a pointer to memory that is not the call's");
        pointer.value = pointer.value - range->begin + range->offset;
        pointer.base = range->base;
        bases_ = std::max(bases_, size_t(range->base) + 1);
      }
    }
    is_placed_ = true;
  }

  // The addresses in launch `index` that `place` has not seen yet.
  std::vector<uint64_t> pointers(size_t index) const {
    std::vector<uint64_t> result;
    for (const Pointer& pointer : steps_.at(index).pointers) result.push_back(pointer.value);
    return result;
  }

  // Launches numbers first to last - 1.
  void run(const std::vector<uint64_t>& bases, cudaStream_t stream, size_t first, size_t last) const {
    if (!is_placed_ || bases.size() < bases_ || last > steps_.size()) {
      throw std::invalid_argument("the plan is not placed, or has other bases or launches");
    }
    for (size_t i = first; i < last; ++i) steps_[i].launch(steps_[i], bases, stream);
  }

  size_t size() const { return steps_.size(); }

 private:
  struct Pointer {
    size_t member;   // bytes from the beginning of the structure
    uint64_t value;  // the address; once placed, the offset from the base
    int base;
  };
  struct Step {
    std::vector<Pointer> pointers;
    std::function<void(const Step&, const std::vector<uint64_t>&, cudaStream_t)> launch;
  };
  std::vector<Step> steps_;
  size_t bases_ = 0;
  bool is_placed_ = false;
};

}  // namespace mcld
