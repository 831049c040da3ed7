// Operand types by precision.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "launchers.h"
#include "platform.cuh"

namespace mcld {

template <Precision> struct OperandOf { using type = float; };
template <> struct OperandOf<Precision::bf16> { using type = bf16; };
template <> struct OperandOf<Precision::fp16> { using type = fp16; };
template <Precision kPrecision> using Operand = typename OperandOf<kPrecision>::type;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr int kWarp = 32;

MCLD_DEVICE float infinity() { return as_float(0x7f800000u); }
MCLD_DEVICE float not_a_number() { return as_float(0x7fc00000u); }

// x = neg_lse - positive / temperature: the loss is log(1 + exp(x)), its derivative 1 / (1 + exp(-x)) is 1 minus the
// probability of the positive.
MCLD_DEVICE float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }
MCLD_DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// A label that is out of range is clamped, so that nothing is read out of bounds; the poison makes its terms NaN.
struct Label {
  bool ignored, bad;
  int64_t class_id;

  static MCLD_DEVICE Label of(int64_t label, int64_t num_classes, int64_t ignore_index) {
    const int64_t class_id = label < 0 ? 0 : label >= num_classes ? num_classes - 1 : label;
    const bool ignored = label == ignore_index;
    return {ignored, !ignored && label != class_id, class_id};
  }
};

template <Precision kPrecision> struct PrecisionTag { static constexpr Precision value = kPrecision; };
template <class T> struct TypeTag { using type = T; };

// call(PrecisionTag<p>) for the p of the argument.
template <class Call> void with_precision(Precision precision, const Call& call) {
  switch (precision) {
    case Precision::bf16: return call(PrecisionTag<Precision::bf16>());
    case Precision::fp16: return call(PrecisionTag<Precision::fp16>());
    case Precision::tf32: return call(PrecisionTag<Precision::tf32>());
    case Precision::tf32x3: return call(PrecisionTag<Precision::tf32x3>());
  }
}
// call(TypeTag<operand type>): for kernels to which both tf32 kinds are one.
template <class Call> void with_operand(Precision precision, const Call& call) {
  switch (precision) {
    case Precision::bf16: return call(TypeTag<bf16>());
    case Precision::fp16: return call(TypeTag<fp16>());
    default: return call(TypeTag<float>());
  }
}
template <class Call> void with_type(Type type, const Call& call) {
  switch (type) {
    case Type::fp32: return call(TypeTag<float>());
    case Type::fp16: return call(TypeTag<fp16>());
    case Type::bf16: return call(TypeTag<bf16>());
  }
}
// call(TypeTag<logits>, TypeTag<operand>) for the pairs there are. (In two functions: nvcc does not name the types of nested
// generic lambdas.)
template <class In, class Out, class Call> void with_pair(TypeTag<In> in, TypeTag<Out> out, const Call& call) {
  if constexpr (std::is_same_v<Out, fp16> && !std::is_same_v<In, fp16>) {
    throw std::invalid_argument("operands of fp16 are made of logits of fp16 alone");
  } else {
    call(in, out);
  }
}
template <class Call> void with_logits(Type type, Precision precision, const Call& call) {
  with_type(type, [&](auto in) { with_operand(precision, [&](auto out) { with_pair(in, out, call); }); });
}
// call(TypeTag<gradient>) for the types there are with operands T: those of fp16 are made of logits of fp16 alone.
template <class T, class Call> void with_gradient(TypeTag<T>, Type type, const Call& call) {
  if constexpr (!std::is_same_v<T, fp16>) {
    if (type == Type::bf16) return call(TypeTag<bf16>());
  }
  if (type != Type::fp32) throw std::invalid_argument("a gradient of fp16 logits is held in fp32");
  call(TypeTag<float>());
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace mcld
