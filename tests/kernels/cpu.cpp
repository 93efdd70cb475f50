// The CPU's kernels of one instruction set against plain loops in double precision, without torch: what
// sanitizers, other compilers and emulators can run. test_kernels.py links it with a build of
// csrc/cpu/kernels/kernels.cpp; LSTMFUSED_ISA names the variant.
#include "cpu_cell.h"
#include "cpu_packed.h"
#include "cpu_sequence.h"
#include "cpu_tangents.h"

#define TEXT(x) #x
#define STRING(x) TEXT(x)
#define PASTE(a, b) a##b
#define NAME(prefix, isa) PASTE(prefix, isa)

constexpr Shape kShapes[] = {{1, 1, 1},    {1, 20, 3},   {2, 5, 17},   {3, 16, 16},  {4, 33, 7},
                             {5, 51, 51},  {7, 2, 20},   {13, 130, 9}, {19, 70, 33}, {64, 16, 16},
                             {70, 3, 150}, {97, 51, 20}, {300, 9, 5},  {6, 300, 40}, {50, 256, 40},
                             {1, 0, 9},    {4, 0, 20},   {33, 0, 8}};

// Half types, with a cell state of their own type and in float32.
template <class T>
static void test(const CellKernels<T>& kernels) {
  for (const Shape shape : kShapes)
    for (int64_t threads : {1, 3}) {
      test_cell<T>(kernels, shape, threads);
      test_cell<float>(kernels, shape, threads);
      test_sequence(kernels, {}, shape, threads);
    }
}

[[maybe_unused]] static void test(const Kernels& kernels) {
  test(kernels.bf16);
  test(kernels.f16);
  for (const Shape shape : kShapes)
    for (int64_t threads : {1, 3}) {
      test_cell<float>(kernels.f32, shape, threads);
      test_cell<double>(kernels.f64, shape, threads);
      test_packed(kernels.packed_f32, shape, threads);
      test_packed(kernels.packed_bf16, shape, threads);
      test_packed(kernels.packed_i8, shape, threads);
      test_sequence(kernels.f32, {kernels.packed_f32, kernels.pack}, shape, threads);
      test_sequence(kernels.f64, {}, shape, threads);
    }
  test_cell<double>(kernels.f64, {600, 9, 130}, 1);                                   // parts of the batch
  for (int64_t B : {3, 7}) test_cell<float>(kernels.f32, {B, 4100, 260}, 2);          // streaming
  for (int64_t B : {7, 20}) test_cell<float>(kernels.f32, {B, 2, 1030}, 2);           // and a row fits L1
  for (int64_t B : {1, 2, 3, 7}) test_packed(kernels.packed_f32, {B, 1600, 520}, 2);  // streaming
  for (int64_t H = 1; H < 36; H++)
    for (int given = 0; given < 64; given++) {
      test_tangents(kernels.tangents_f32, 3, H, 2, given);
      test_tangents(kernels.tangents_f64, 3, H, 2, given);
    }
  for (int64_t H = 1; H < 20; H++)  // every width of the last block
    test_packed(kernels.packed_f32, {5, 3, H}, 1);
}

int main() {
  test(NAME(kernels_, LSTMFUSED_ISA));
  printf("%s: %d failures\n", STRING(LSTMFUSED_ISA), failures);
  return failures != 0;
}
