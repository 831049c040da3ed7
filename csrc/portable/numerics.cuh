// Operand types by precision, and neighbouring elements at once.
#pragma once

#include "launchers.h"
#include "platform.cuh"

namespace mcld {

template <Precision> struct OperandOf { using type = float; };
template <> struct OperandOf<Precision::bf16> { using type = bf16; };
template <> struct OperandOf<Precision::fp16> { using type = fp16; };
template <Precision kPrecision> using Operand = typename OperandOf<kPrecision>::type;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kHalfLift = 15;  // what moves exponentials of a fixed shift into fp16's range, as mcld_kernels/cuda.py has it
constexpr int kWarp = 32;

MCLD_DEVICE float infinity() { return as_float(0x7f800000u); }
MCLD_DEVICE float not_a_number() { return as_float(0x7fc00000u); }

// 4 neighbouring elements of an operand row, whose address is a multiple of 4 elements.
MCLD_DEVICE void load4(float (&x)[4], const float* p) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
template <class T> MCLD_DEVICE void load4(float (&x)[4], const T* p) {
  struct alignas(8) Four { T value[4]; };
  const Four v = *reinterpret_cast<const Four*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = to_float(v.value[i]);
}
MCLD_DEVICE void store4(float* p, const float (&x)[4]) { *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]); }
template <class T> MCLD_DEVICE void store4(T* p, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
}

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

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace mcld
