// The CUDA kernels against plain loops in double precision, without CUDA: simt.h is their GPU. They run on
// several devices, and on one device come out the same under several orders of the threads.
//
// "quick" is a small selection, enough to miss a barrier or a wait, up to the first failure. "once" has one
// order for each device and one half type, for sanitizers: where a kernel reads and writes does not depend
// on these.
#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_gpu.h"

struct Shape {
  int64_t B, I, H;
};
static const vector<Shape> kQuick{{2, 3, 7}, {9, 72, 72}, {20, 99, 67}, {65, 392, 72}};
static const vector<Shape> kAll{{1, 1, 1},     {1, 130, 64},  {1, 72, 64},    {2, 3, 7},     {2, 20, 33},
                                {2, 264, 264}, {3, 16, 16},   {3, 51, 72},    {3, 0, 20},    {5, 2, 20},
                                {5, 72, 40},   {8, 33, 20},   {8, 20, 64},    {9, 7, 3},     {9, 64, 20},
                                {17, 130, 2},  {17, 16, 33},  {33, 1, 16},    {33, 72, 64},  {64, 20, 16},
                                {64, 64, 20},  {97, 3, 20},   {97, 130, 72},  {130, 3, 16},  {130, 72, 16},
                                {130, 7, 130}, {130, 16, 64}, {130, 136, 64}, {260, 24, 40}, {66, 392, 72}};

enum class Selection { kAll, kQuick, kOnce };

// Those of one device follow one another.
static vector<Setting> settings_for(Selection selection, bool few) {
  using simt::Order;
  const Device large{90, 132, 227 << 10, nullptr, 0}, small{80, 4, 163 << 10, nullptr, 0},
      narrow{89, 128, 99 << 10, nullptr, 0}, lone{100, 1, 227 << 10, nullptr, 0},
      lone_hopper{90, 1, 227 << 10, nullptr, 0};
  if (selection == Selection::kQuick)
    return {{large, Order::kForward}, {large, Order::kBackward}, {large, Order::kGreedy}};
  if (selection == Selection::kOnce && few) return {{large, Order::kForward}, {small, Order::kGreedy}};
  if (selection == Selection::kOnce)
    return {{large, Order::kForward},
            {small, Order::kGreedy},
            {narrow, Order::kForward},
            {lone, Order::kGreedy},
            {lone_hopper, Order::kBackward}};
  if (few)
    return {{large, Order::kForward},
            {large, Order::kBackward},
            {large, Order::kGreedy},
            {large, Order::kRandom},
            {small, Order::kGreedy}};
  return {{large, Order::kForward},       {large, Order::kBackward},     {large, Order::kGreedy},
          {narrow, Order::kForward},      {lone, Order::kGreedy},  // other tiles
          {lone_hopper, Order::kForward}, {lone_hopper, Order::kGreedy}, {small, Order::kGreedy}};
}

// C is the type of the cell state.
template <class T, class C = T>
static void test(const Shape& shape) {
  for (const Layout layout : {Layout{false}, Layout{true}}) {
    test_forward<T, C>(shape.B, shape.I, shape.H, layout);
    test_backward<T, C>(shape.B, shape.I, shape.H, layout);
  }
}

int main(int count, char** words) {
  const char* const word = count > 1 ? words[1] : "";
  const Selection selection = !strcmp(word, "quick")  ? Selection::kQuick
                              : !strcmp(word, "once") ? Selection::kOnce
                                                      : Selection::kAll;
  const bool quick = selection == Selection::kQuick;
  until_first_failure = quick;
  test_gpu();
  for (const Shape& shape : quick ? kQuick : kAll) {
    settings = settings_for(selection, are_few(shape.B, shape.I, shape.H));
    test<float>(shape);
    test<float16>(shape);
    test<float16, float>(shape);
    if (quick) continue;
    test<double>(shape);
    if (selection == Selection::kOnce) continue;  // bfloat16 is read and written where float16 is
    test<bfloat16>(shape);
    test<bfloat16, float>(shape);
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
