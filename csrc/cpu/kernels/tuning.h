// What was tuned by measurement, with the unit of each constant and the processor it was measured on. Where
// none is named: an Intel Xeon with AMX (Sapphire Rapids), confirmed on Zen 4. None of these changes what
// is computed, but kKBlock, which says how sums are grouped.
//
// Constants only: this header is compiled once for each instruction set, and once for torch's side.
#pragma once
#include <stdint.h>

namespace lstmfused {

// ---------------------------------------------------------------------------------------------------
// Registers and L1: the tile of a product

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 24;  // vectors of sums in flight, of 32 registers
constexpr int kDotVectors = 16;   // the same for dot products
#else
constexpr int kTileVectors = 12;  // of 16
constexpr int kDotVectors = 12;
#endif
constexpr int kTileRows = 12;      // rows; more have too many loads for their additions
constexpr int kTwoVectorRows = 8;  // rows beside two vectors: more would evict each other's lines from L1
constexpr int kPanel = 4;          // vectors in a row of the right factor, at most
constexpr int kKBlock = 128;       // numbers of the depth; by kPanel vectors 32 KiB or less: L1
constexpr int kSumRows = 512;      // rows of kPanel vectors of sums in scratch

// ---------------------------------------------------------------------------------------------------
// Forward

constexpr int kPanelUnits = kSumRows / 4;  // units of a panel at most: its scratch holds their four sums
constexpr int kPanelBytes = 128 << 10;     // bytes of transposed input and state: a part of L2
constexpr int kDotRows = 128;              // rows of a task of dots at most: its scratch holds their sums

// What a unit of a row costs, as a dot or in a panel of several vectors of rows (wide) or of one (narrow),
// in hundredths of a multiply-add: so much for each factor of the depth, and so much beside. Zen 4,
// float32, from 2 -> 20 to 1024 -> 1024; not measured on aarch64.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kDotCost = 105, kDotMore = 6900, kPanelMore = 2800, kWideCost = 104, kNarrowCost = 133;
#else
constexpr int64_t kDotCost = 119, kDotMore = 950, kPanelMore = 0, kWideCost = 100, kNarrowCost = 124;
#endif
// Factors of the depth from which on a batch-invariant step uses dots: below, to sum up their lanes would
// be half as much again.
constexpr int64_t kInvariantDotDepth = 80;

constexpr int64_t kFewestUnits = 32;  // units of a task beside several vectors of rows: below, transposing
                                      // the rows begins to show

// Weights that no cache keeps from call to call and that stream from DRAM.
constexpr int64_t kStreamingBytes = 16 << 20;
constexpr int64_t kL1Bytes = 32 << 10;           // rows of input that fit here are not cut into K-blocks
constexpr int64_t kStreamingKBlockBytes = 2048;  // of a row of input
constexpr int kStreamingUnits = 8;               // units that pass over a K-block before the next one
constexpr int kStreamingTiles = 4;               // tiles of rows, each as many as kDotVectors allow
constexpr int64_t kL1PrefetchBytes = 1024;       // ahead of the loads
constexpr int64_t kPageBytes = 4096;  // the hardware prefetcher stops at its end: prefetch one page ahead

constexpr int64_t kEpilogueWork = 50;    // the epilogue's cost, in multiply-adds of each of the four sums
constexpr int64_t kWeightFetchWork = 2;  // the cost of fetching a weight, in multiply-adds

constexpr int64_t kPackWork = 8;  // the cost of packing a weight, in multiply-adds
// Quarters of each thread's L2 beyond which packed weights are prefetched from further away.
constexpr int64_t kPackedL2Quarters = 3;
// Rows of a step from which on its input is multiplied with the state, rather than the input of many steps
// at once; and rows of all steps, in quarters of the depth, from which on packing a sequence's weights pays
// where steps have fewer or more rows than that.
constexpr int64_t kJointRows = 24, kPackedFewRows = 1, kPackedManyRows = 8;
// Bytes of the state's weights from which on packing them for backward pays, if each is met by enough rows
// of all steps: a quarter of the units. Steps of kPackRows want it of any weights.
constexpr int64_t kPackedStateBytes = 2 << 20;
constexpr int kPackedRows = 256;  // rows of a task at most: its scratch holds their sums

// ---------------------------------------------------------------------------------------------------
// Backward

constexpr int64_t kGateGradientWork = 100;    // the cost of a state's gate gradients, in multiply-adds
constexpr int64_t kGateGradientStates = 128;  // states of rows side by side, where one has fewer
constexpr int64_t kTangentWork = 250;         // the cost of a state's tangents, in multiply-adds

// A part of the batch at a time: its gate gradients at least kPartStates states and at most kPartBytes, a
// share of L3, its rows a multiple of kPartMultiple, which is one of kKBlock. Zen 4.
constexpr int64_t kPartStates = 32768, kPartBytes = 24 << 20, kPartMultiple = 256;

// Bytes of a sequence's sums or gate gradients, some steps at a time: a share of L2.
constexpr int64_t kStepsBytes = 1 << 20;

// The products.
constexpr int64_t kBlockRows = 384;   // by as many columns as leave half of L2 to other things
constexpr int64_t kScratchRows = 96;  // where sums need a scratch, by as many columns as it holds
// So few rows (of 4 vectors two tiles) leave a block of the right factor no time to be fetched: it is read
// nearly in the order in which it lies. Zen 4.
constexpr int64_t kSmallProductTiles = 2, kSmallProductKBlock = 32;
// Rows and depth from which on a copy of the right factor, panel by panel, pays; columns from which on one
// of the left factor does.
constexpr int64_t kPackRows = 48, kPackDepth = 33, kGatherColumns = 256;
// Bytes of the result that leave L2 from block to block, and that fit no cache beside the rest. To write
// less than that by non-temporal stores is sooner done, but the optimizer that reads it next loses more.
// Zen 4.
constexpr int64_t kPrefetchSumsBytes = 2 << 20, kNontemporalBytes = 8 << 20;
// Bytes of the right factor that exceed TLB reach: few rows would wait for each page. Zen 4.
constexpr int64_t kTlbBytes = 8 << 20;

// ---------------------------------------------------------------------------------------------------
// Threads and memory

constexpr int64_t kWorkPerThread = 100'000;  // multiply-adds: less is done sooner by one thread alone
// The same within a sequence, whose threads wait for one another's step already; and how often they look
// before they let others run.
constexpr int64_t kWorkPerTeammate = 80'000, kSpins = 512;
constexpr int64_t kHugePageTensor = 4 << 20;      // bytes of a tensor that asks for huge pages
constexpr int64_t kHugePageAlignment = 64 << 10;  // bytes: whole pages wherever these are no larger

}  // namespace lstmfused
