// The contract between torch and the kernels: plain structs, no torch.
//
// Shapes: B batch, I input, H units. Gates in torch's order i, f, g, o: row g * H + u of a weight or
// column g * H + u of a gate buffer belongs to gate g of unit u. Every matrix is row-major with
// contiguous rows; a *_stride is the distance between rows, in elements (0 repeats one row).
//
// T is the dtype of the tensors, A = Accumulate<T> the type in which sums are formed. The cell state and
// its gradients, cx, c, grad_c and grad_cx, are of type T or, where wide_cell says so, of type A: a T* then
// points to A, and its stride counts A.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace lstmfused {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

// What becomes of a row in a step of a sequence.
enum class RowMask : uint8_t {
  kStep,
  kReset,  // its state counts as zero
  kSkip,   // h' = hx and c' = cx; its gates are of no use
};

// What a step reads and writes, weights aside.
template <class T>
struct Step {
  int64_t B, I, H;
  const T* input;  // (B, I)
  int64_t input_stride;
  const T* hx;  // (B, H)
  int64_t hx_stride;
  const T* cx;  // (B, H)
  int64_t cx_stride;
  T* h;      // (B, H)
  T* c;      // (B, H)
  T* gates;  // (B, 4H) activated gates, or null when no gradient is wanted
  bool wide_cell = false;
  // For sequences, on the CPU. What input and biases add to the gates before activation, which is made for
  // many steps at once: (B, 4H), or null. Rows lie 4H apart.
  //
  // Written, and nothing else: h, c, hx and cx are not looked at. I is not 0.
  Accumulate<T>* sums = nullptr;
  // Read, and added to what the state adds; may be where gates are written.
  const Accumulate<T>* starting_sums = nullptr;
  // (B), or null. A reset drops the sums that this step has formed, so I is 0 where it occurs.
  const RowMask* mask = nullptr;

  // Factors of the state in the sums.
  int64_t state_depth() const { return sums ? 0 : H; }
};

template <class T>
struct Forward : Step<T> {
  const T* weight_ih;    // (4H, I)
  const T* weight_hh;    // (4H, H)
  const T* bias_ih;      // (4H) or null
  const T* bias_hh;      // (4H) or null
  bool batch_invariant;  // a row's result depends on nothing but the row
};

// A step from packed weights of type W, float, bfloat16 or int8_t; everything else is float. Units come in
// blocks of kPackedUnits, one after the other; the last may be narrower, padded with zeros to a multiple of
// kPackedMultiple. The layout does not depend on the instruction set: weights packed on one machine run on
// another. kPackedFormat is stored with them; a change of the layout needs a new one.
constexpr int kPackedFormat = 1, kPackedUnits = 16, kPackedMultiple = 4;

template <class W>
struct Packed : Step<float> {
  const W* weight;       // of each block (depth, 4, units): the rows of the input, then those of the state
  const float* scale;    // of each block (4, units), by which the sums are multiplied, or null
  const float* bias;     // of each block (4, units), the sum of both, or null
  int64_t begin, depth;  // the step's first row of a block, and all rows of a block
};

// Weights to be packed for a sequence, which takes no longer than a few rows' multiplication with them.
struct Pack {
  int64_t H, K;  // units, depth
  const float* weight;
  int64_t unit_stride, depth_stride;  // gate g of unit u at depth k: (g * H + u, k)
  float* packed;
  int64_t begin, depth;  // the first row of a block that is written, and all rows of a block
};
constexpr int64_t packed_units(int64_t H) {
  return (H + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple;
}

// X is the type of the gate gradients, a left factor: the CPU's kernels want it widened, CUDA's do not.
template <class T, class X = Accumulate<T>>
struct Backward {
  int64_t B, I, H;
  const T* grad_h;  // (B, H) or null for zeros
  int64_t grad_h_stride;
  const T* grad_c;  // (B, H) or null for zeros
  int64_t grad_c_stride;
  const T* gates;  // (B, 4H), or null where grad_gates are given: the products with them are left
  const T* input;  // (B, I) or null where grad_weight_ih is
  int64_t input_stride;
  const T* hx;  // (B, H) or null where grad_weight_hh is
  int64_t hx_stride;
  const T* cx;  // (B, H)
  int64_t cx_stride;
  const T* weight_ih;         // (4H, I) or null where grad_input is
  const T* weight_hh;         // (4H, H) or null where grad_hx is, or where all rows are skipped
  int64_t rows;               // that grad_gates has: of the whole batch, or of a part of it at a time
  X* grad_gates;              // (rows, 4H) scratch, or gates themselves, which are overwritten
  int64_t grad_gates_stride;  // at least 4H
  // Each of these is null when it is not wanted.
  T* grad_input;      // (B, I)
  T* grad_hx;         // (B, H)
  T* grad_cx;         // (B, H)
  T* grad_weight_ih;  // (4H, I)
  T* grad_weight_hh;  // (4H, H)
  // (4H): the same numbers, each for its bias
  T* grad_bias_ih;
  T* grad_bias_hh;
  bool wide_cell = false;
  // For sequences, on the CPU.
  //
  // (B), or null. Where a row is reset, hx is zero in the product of grad_weight_hh: the caller gives it
  // so.
  const RowMask* mask = nullptr;
  // (B, H), or null: what the next step adds to grad_h and grad_c.
  const T* next_grad_h = nullptr;
  const T* next_grad_c = nullptr;
  bool accumulate = false;  // add to the gradients of weights and biases; where T holds sums
  // The gradients of weights are (I, 4H) and (H, 4H), as Keras has them; where T holds sums.
  bool transposed = false;
  // In place of weight_hh, of float: it, transposed, as Pack takes the weights of H / 4 units by 4H.
  const T* packed_hh = nullptr;
};

// The tangents of a step and of its backward, as far as they are made unit by unit: those of the sums
// before activation go in, those of the sums' gradients come out. Every matrix is contiguous.
template <class T>
struct Tangents {
  int64_t B, H;
  const T* gates;  // (B, 4H)
  const T* cx;     // (B, H)
  // Each of these is null for zeros.
  const T* grad_h;          // (B, H)
  const T* grad_c;          // (B, H)
  const T* sums_tangent;    // (B, 4H)
  const T* cx_tangent;      // (B, H)
  const T* grad_h_tangent;  // (B, H)
  const T* grad_c_tangent;  // (B, H)
  T* h_tangent;             // (B, H)
  T* c_tangent;             // (B, H)
  // These are null, together, when they are not wanted.
  T* grad_gates_tangent;  // (B, 4H)
  T* grad_gates;          // (B, 4H)
  T* grad_cx_tangent;     // (B, H)
};

}  // namespace lstmfused
