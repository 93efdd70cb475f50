/* What this processor can do at best, per thread: fused multiply-adds and reads.
 *
 *   cc -O3 -shared -fPIC -mavx512f roofline.c -o roofline.so
 *
 * Every function runs for `seconds` and returns a rate, so that threads started together
 * also end together and their rates add up. */
#include <stdint.h>
#include <time.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
#define CHAINS 12 /* latency 4 x 2 units is 8; 12 accumulators still fit AVX2's 16 registers */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* flop/s of independent chains x = x * a + b, each one vector wide; it converges to 1 */
#define PEAK(name, scalar)                                                        \
  double name(double seconds) {                                                   \
    typedef scalar vector __attribute__((vector_size(VECTOR)));                   \
    enum { STEPS = 100000, LANES = VECTOR / sizeof(scalar) };                     \
    vector x[CHAINS], a, b;                                                       \
    volatile scalar half = (scalar)0.5; /* or a chain is found to be constant */  \
    for (int lane = 0; lane < LANES; ++lane) a[lane] = b[lane] = half;            \
    for (int chain = 0; chain < CHAINS; ++chain) x[chain] = a * (scalar)chain;    \
    double start = now(), elapsed, flops = 0;                                     \
    do {                                                                          \
      for (int step = 0; step < STEPS; ++step)                                    \
        for (int chain = 0; chain < CHAINS; ++chain) x[chain] = x[chain] * a + b; \
      flops += 2.0 * STEPS * CHAINS * LANES;                                      \
      elapsed = now() - start;                                                    \
    } while (elapsed < seconds);                                                  \
    for (int chain = 1; chain < CHAINS; ++chain) x[0] += x[chain];                \
    volatile scalar used = x[0][0]; /* or the chains are optimised away */        \
    (void)used;                                                                   \
    return flops / elapsed;                                                       \
  }

PEAK(peak_float32, float)
PEAK(peak_float64, double)

#ifdef __AVX512BF16__
/* the same of dot products of pairs; an accumulator grows until adding no longer changes it */
double peak_bfloat16(double seconds) {
  enum { STEPS = 100000, LANES = 32 };
  __m512 x[CHAINS];
  const __m512bh half = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  for (int chain = 0; chain < CHAINS; ++chain) x[chain] = _mm512_set1_ps((float)chain);
  double start = now(), elapsed, flops = 0;
  do {
    for (int step = 0; step < STEPS; ++step)
      for (int chain = 0; chain < CHAINS; ++chain) x[chain] = _mm512_dpbf16_ps(x[chain], half, half);
    flops += 2.0 * STEPS * CHAINS * LANES;
    elapsed = now() - start;
  } while (elapsed < seconds);
  for (int chain = 1; chain < CHAINS; ++chain) x[0] += x[chain];
  volatile float used = x[0][0];
  (void)used;
  return flops / elapsed;
}
#endif

/* bytes/s of reading `bytes` at `data` again and again; whole passes over blocks of 8 vectors */
double bandwidth(const void* data, int64_t bytes, double seconds) {
  typedef uint64_t vector __attribute__((vector_size(VECTOR), aligned(8)));
  enum { BLOCK = 8 };
  const vector* p = data;
  const int64_t blocks = bytes / (BLOCK * VECTOR);
  const int64_t passes = 1 + (1 << 20) / bytes; /* about a megabyte between looks at the clock */
  vector x[BLOCK] = {{0}};
  double start = now(), elapsed, read = 0;
  do {
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t block = 0; block < blocks; ++block)
        for (int k = 0; k < BLOCK; ++k) x[k] ^= p[block * BLOCK + k];
      __asm__ volatile("" ::: "memory"); /* each pass reads anew */
    }
    read += (double)passes * (double)blocks * BLOCK * VECTOR;
    elapsed = now() - start;
  } while (elapsed < seconds);
  for (int k = 1; k < BLOCK; ++k) x[0] ^= x[k];
  volatile uint64_t used = x[0][0];
  (void)used;
  return read / elapsed;
}
