// The claims of csrc/root.h, of every number that they are made of.
#include <cmath>
#include <cstdio>

#include "../csrc/root.h"

namespace {

using namespace xgrad;

int64_t n_wrong = 0;

void compare(const char* what, float x, float found, float expected) {
  if (bit_cast<uint32_t>(found) == bit_cast<uint32_t>(expected)) return;
  if (++n_wrong < 20) std::printf("%s: sqrt(%a) is %a, not %a\n", what, x, expected, found);
}

float from_bits(uint32_t bits) { return bit_cast<float>(bits); }

// Calls `visit` with each float within so many units in the last place of a positive number.
template <class Visit> void for_each_float_near(double exact, double units, Visit visit) {
  const uint32_t nearest = bit_cast<uint32_t>(static_cast<float>(exact));
  const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
  for (uint32_t bits = nearest - 2; bits != nearest + 3; ++bits) {
    if (std::fabs(from_bits(bits) - exact) <= units * unit) visit(from_bits(bits));
  }
}

// Any estimate, of all x in [1/2, 2): multiplied by powers of 4 they are all numbers.
void try_every_estimate() {
  const float exceptions[] = {0x1.fffffep-1f, 0x1.000002p+0f};
  for (uint32_t bits = 126u << 23; bits != 128u << 23; ++bits) {
    const float x = from_bits(bits), expected = sqrtf(x);
    if (x == exceptions[0] || x == exceptions[1]) continue;
    const double root = std::sqrt(double{x});
    for_each_float_near(root, 1.25, [&](float near_root) {
      for_each_float_near(0.5 / root, 1.25, [&](float half_reciprocal) {
        compare("corrected", x, correct_root(x, near_root, half_reciprocal), expected);
      });
    });
  }
  for (float x : exceptions) {
    const double exact = 1 / std::sqrt(double{x});
    uint32_t bits = bit_cast<uint32_t>(static_cast<float>(exact * (1 - 0x1p-14))) - 1;
    int n_estimates = 0;
    for (; from_bits(bits) <= exact * (1 + 0x1p-14); ++bits, ++n_estimates) {
      compare("refined", x, refine_root(x, from_bits(bits)), sqrtf(x));
    }
    n_wrong += n_estimates < 1500;  // the loop has run
  }
}

// All floats there are, by this machine's estimates.
void try_every_vector() {
  using V = Vector<float>;
  for (uint64_t first = 0; first < uint64_t{1} << 32; first += kLanes<float>) {
    UInts bits;
    for (int lane = 0; lane < kLanes<float>; ++lane) bits[lane] = static_cast<uint32_t>(first) + lane;
    const V x = bit_cast<V>(bits), found = MultipliedRoots<V>::square_root(x), expected = sqrt_vector(x);
    if (std::memcmp(&found, &expected, sizeof(V)) == 0) continue;
    for (int lane = 0; lane < kLanes<float>; ++lane) compare("vector", x[lane], found[lane], expected[lane]);
  }
}

}  // namespace

int main() {
  try_every_estimate();
  try_every_vector();
  std::printf("%lld wrong\n", static_cast<long long>(n_wrong));
  return n_wrong != 0;
}
