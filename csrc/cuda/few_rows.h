// Few rows: a step as dot products, in one launch. Weights are read as they lie, once for up to
// eight rows.
//
// Each unit has one warp, or more where units are few: lanes run along K, the four gates of some rows are
// summed at once, and what the lanes have is added up in an order that depends on neither batch nor row.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

constexpr int kFewThreads = 128;  // of a block, at least

// N elements at a time, 1 or a vector.
template <int N, class T>
struct Piece {
  Accumulate<T> at[N];
};
template <int N, bool kOnce, class T>
LSTMFUSED_DEVICE Piece<N, T> load_piece(const T* from) {
  Piece<N, T> piece;
  if constexpr (N == 1) {
    piece.at[0] = widen(*from);
  } else {
    Vector<T> vector;
    if constexpr (kOnce) {
      const uint4 bits = load_once(from);
      memcpy(&vector, &bits, sizeof vector);
    } else {
      vector = *reinterpret_cast<const Vector<T>*>(from);
    }
#pragma unroll
    for (int i = 0; i < N; i++) piece.at[i] = widen(vector.at[i]);
  }
  return piece;
}

// sums[r][gate] += left[r] . weight[gate * H + unit], of which this thread has the pieces from `first` on,
// `step` apart. Rows beyond the last repeat it: nobody looks at their sums.
template <int R, int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void add_dots(A (&sums)[R * 4], const T* left, int64_t left_stride, int last,
                               const T* weight, int64_t H, int64_t unit, int64_t K, int first, int step) {
#pragma unroll 2
  for (int k = first; k < K; k += step) {
    Piece<N, T> w[4];
#pragma unroll
    for (int gate = 0; gate < 4; gate++) w[gate] = load_piece<N, true>(weight + (gate * H + unit) * K + k);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const Piece<N, T> x = load_piece<N, false>(left + (r < last ? r : last) * left_stride + k);
#pragma unroll
      for (int gate = 0; gate < 4; gate++)
#pragma unroll
        for (int i = 0; i < N; i++) sums[r * 4 + gate] += x.at[i] * w[gate].at[i];
    }
  }
}

// Adds up each of `Count` (a power of two) sums over the lanes of a warp. Lane l gets sum l * Count / 32:
// at each step, one half of the lanes keeps one half of the sums.
template <int Count, int Mask = kWarp / 2, class A>
LSTMFUSED_DEVICE A sum_lanes(A* sums) {
  constexpr int half = Count / 2;
  if constexpr (half > 0) {
    const bool upper = threadIdx.x & Mask;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const A keep = upper ? sums[half + i] : sums[i], give = upper ? sums[i] : sums[half + i];
      sums[i] = keep + shuffle_xor(give, Mask);
    }
  } else {
    sums[0] += shuffle_xor(sums[0], Mask);
  }
  if constexpr (Mask > 1) return sum_lanes<(half > 0 ? half : 1), Mask / 2>(sums);
  return sums[0];
}

// Block (32, warps of a unit, units), grid (blocks of R rows, blocks of units).
template <class T, int R, int N>
__global__ void few_rows(const Forward<T> p) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t unit = int64_t(blockIdx.y) * blockDim.z + threadIdx.z;
  const int64_t row = int64_t(blockIdx.x) * R;
  const int last = p.B - row < R ? int(p.B - row) - 1 : R - 1;

  const int64_t some_unit = unit < p.H ? unit : p.H - 1;  // all threads must come to the barrier
  const int first = (warp * kWarp + lane) * N, step = warps * kWarp * N;
  A sums[R * 4] = {};
  add_dots<R, N>(sums, p.input + row * p.input_stride, p.input_stride, last, p.weight_ih, p.H, some_unit,
                 p.I, first, step);
  add_dots<R, N>(sums, p.hx + row * p.hx_stride, p.hx_stride, last, p.weight_hh, p.H, some_unit, p.H, first,
                 step);

  constexpr int kLanesOfSum = kWarp / (R * 4);
  A* const shared = reinterpret_cast<A*>(shared_memory()) + threadIdx.z * warps * R * 4;  // (warps, R, 4)
  const A sum = sum_lanes<R * 4>(sums);
  if (lane % kLanesOfSum == 0) shared[warp * R * 4 + lane / kLanesOfSum] = sum;
  __syncthreads();

  const int r = lane;
  if (warp > 0 || r > last || unit >= p.H) return;
  Gates<A> total{};
  for (int w = 0; w < warps; w++) {
    const A* part = shared + (w * R + r) * 4;
    total = {total.i + part[0], total.f + part[1], total.g + part[2], total.o + part[3]};
  }
  finish_state(p, row + r, unit, total, sum_bias(p, unit));
}

template <class T>
const char* forward_few_rows(const Forward<T>& p, const Device& device) {
  const bool vectors = in_vectors(p.input, p.input_stride, p.I) && in_vectors(p.hx, p.hx_stride, p.H) &&
                       in_vectors(p.weight_ih, p.I, p.I) && in_vectors(p.weight_hh, p.H, p.H);
  const auto run = [&](auto rows, auto width) {
    constexpr int R = decltype(rows)::value, N = decltype(width)::value;
    // As many warps a unit as find work and a multiprocessor has room for, whatever the batch.
    const int64_t K = p.I > p.H ? p.I : p.H;
    unsigned warps = 1;
    while (warps < 8 && 2 * warps * kWarp * N <= K && 2 * warps * p.H <= 16 * device.multiprocessors)
      warps *= 2;
    const unsigned units = warps * kWarp < kFewThreads ? kFewThreads / kWarp / warps : 1;
    const dim3 grid(unsigned(ceil_div(p.B, R)), unsigned(ceil_div(p.H, units)));
    const size_t shared = sizeof(Accumulate<T>) * units * warps * R * 4;
    return launch(few_rows<T, R, N>, grid, dim3(kWarp, warps, units), shared, device.stream, p);
  };
  const auto with_width = [&](auto rows) {
    return vectors ? run(rows, Number<kVector<T>>{}) : run(rows, Number<1>{});
  };
  if (p.B == 1) return with_width(Number<1>{});
  if (p.B == 2) return with_width(Number<2>{});
  return p.B <= 4 ? with_width(Number<4>{}) : with_width(Number<8>{});
}

}  // namespace cuda
}  // namespace lstmfused
