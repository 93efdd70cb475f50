// What the CUDA kernels offer; neither torch nor CUDA is needed to read it.
#pragma once
#include "../../lstm.h"

namespace lstmfused {
namespace cuda {

struct Device {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int shared_memory;  // of a block at most, in bytes
  void* stream;       // a cudaStream_t
  int index;
};
const char* describe(int index, Device&);  // but for the stream

struct Problem {
  int64_t B, I, H;
  bool tf32;  // products of float32 may round their factors to tf32
};

// How a step is computed.
enum class Path {
  kSmallBatch,   // dot products: each weight is read once for up to eight rows
  kTensorCores,  // mma.sync, with the step in the epilogue
  kWarpgroups,   // wgmma, on Hopper, likewise
  kProducts,     // matrix products by cuBLAS, through torch, then finish()
};
template <class T>
bool has_tensor_cores(bool tf32, const Device&);
template <class T>
bool has_warpgroups(const Device&);
template <class T>
Path forward_path(const Problem&, const Device&);
template <class T>
Path backward_path(const Problem&, const Device&);  // kSmallBatch or kProducts

// Each returns null, or what CUDA says went wrong. Nothing waits for the device.

template <class T>
const char* forward_small_batch(const Forward<T>&, const Device&);
template <class T>
const char* forward_tensor_cores(const Forward<T>&, const Device&);  // where has_tensor_cores()
template <class T>
const char* forward_warpgroups(const Forward<T>&, const Device&);  // where has_warpgroups()
// The pointwise part of the step, from sums (B, 4H) = input @ weight_ih^T + hx @ weight_hh^T. p.gates may
// be sums.
template <class T>
const char* finish(const Forward<T>& p, const Accumulate<T>* sums, const Device&);

// The gradients of the gates before activation, of cx and of the biases. partial is scratch of
// bias_chunks() by 4H, for the batch may be cut into several chunks.
template <class T>
int64_t bias_chunks(const Problem&, const Device&);
template <class T>
const char* gate_gradients(const Backward<T, T>&, Accumulate<T>* partial, const Device&);
// From p.grad_gates: the gradients of input, hx and of the weights, one launch for all.
template <class T>
const char* backward_small_batch(const Backward<T, T>&, const Device&);

}  // namespace cuda
}  // namespace lstmfused
