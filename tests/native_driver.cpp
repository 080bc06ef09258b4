// The CPU kernels without torch, for AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is an allocation of
// exactly its size, at every alignment that an element allows, and each element must come out as it does alone.
//
//   native_driver SEED
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/chunk_loop.h"

namespace {

using namespace xgrad;

template <class Storage> Storage to_storage(double x) { return static_cast<Storage>(x); }
template <> BFloat16 to_storage(double x) {
  return {static_cast<uint16_t>(narrow<uint32_t>(static_cast<float>(x), BFloat16{}))};
}
template <> Float16 to_storage(double x) {
  return {static_cast<uint16_t>(narrow<uint32_t>(static_cast<float>(x), Float16{}))};
}

template <class T, class Storage> T from_storage(Storage x) { return x; }
template <> float from_storage(BFloat16 x) { return widen<float>(uint32_t{x.bits}, BFloat16{}); }
template <> float from_storage(Float16 x) { return widen<float>(uint32_t{x.bits}, Float16{}); }

// `numel` elements that begin `shift` elements after an allocation's aligned start and end with the allocation.
template <class Storage> class Buffer {
 public:
  Buffer(int64_t numel, int64_t shift, std::mt19937& random, bool is_positive) : shift_(shift), data_(shift + numel) {
    std::normal_distribution<double> normal;
    for (Storage& x : data_) {
      const double value = normal(random);
      x = to_storage<Storage>(is_positive ? value * value : value);
    }
    data_.shrink_to_fit();
  }
  int64_t address() {
    return data_.size() == static_cast<size_t>(shift_) ? 0 : reinterpret_cast<int64_t>(&data_[shift_]);
  }
  Storage& operator[](int64_t i) { return data_[shift_ + i]; }
  bool same_bits(Buffer& other) {
    return data_.empty() || std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(Storage)) == 0;
  }

 private:
  int64_t shift_;
  std::vector<Storage> data_;
};

template <class Rule, class Param, class State> struct Tensors {
  using T = Compute<Param>;
  Buffer<Param> param, grad;
  std::vector<Buffer<State>> state;  // the optional one included, where the rule has one
  Buffer<T> master_weights;

  Tensors(int64_t numel, int64_t shift, std::mt19937& random)
      : param(numel, shift, random, false),
        grad(numel, shift, random, false),
        master_weights(numel, shift, random, false) {
    for (int i = 0; i < Rule::kNumStates + Rule::kHasOptional; ++i) state.emplace_back(numel, shift, random, i > 0);
  }

  void fill(Line& line, Buffers buffers) {
    line.param = param.address();
    for (int i = 0; i < num_states<Rule>(buffers); ++i) line.state[i] = state[i].address();
    if (buffers.has_master_weights) line.master_weights = master_weights.address();
  }

  // One element by itself, through the scalar numbers.
  void run_alone(int64_t i, const Hyper<Rule, T>& hyper, Buffers buffers) {
    Element<Rule, T> element{};
    element.param = from_storage<T>(param[i]);
    element.grad = from_storage<T>(grad[i]);
    for (int s = 0; s < num_states<Rule>(buffers); ++s) element.state[s] = from_storage<T>(state[s][i]);
    element.master_weights = master_weights[i];
    run_element<Rule, Param, State>(element, hyper, buffers);
    param[i] = to_storage<Param>(element.param);
    for (int s = 0; s < num_states<Rule>(buffers); ++s) state[s][i] = to_storage<State>(element.state[s]);
    if (buffers.has_master_weights) master_weights[i] = element.master_weights;
  }

  bool same_bits(Tensors& other) {
    bool same = param.same_bits(other.param) && grad.same_bits(other.grad) &&
                master_weights.same_bits(other.master_weights);
    for (size_t s = 0; s < state.size(); ++s) same = same && state[s].same_bits(other.state[s]);
    return same;
  }
};

template <class S> std::vector<S> random_rows(int64_t n_rows, int64_t n_columns, bool has_grad, std::mt19937& random) {
  std::uniform_real_distribution<S> uniform(S(0.01), S(0.9));
  std::vector<S> rows(n_rows * n_columns);
  for (S& coefficient : rows) coefficient = uniform(random);
  for (int64_t row = 0; row < n_rows; ++row) {
    S* columns = &rows[row * n_columns];
    columns[0] = row == 4;                         // is_skipped
    columns[1] = row % 2 ? S(-1) : S(1);           // grad_factor
    if (row % 3 == 0) columns[2] = 0;              // weight_decay
    if (!has_grad) columns[5 + row % 2] = 0;       // a swap goes one way: shift or shift_prev
    if (row % 5 == 0) columns[5] = columns[6] = 0;
  }
  return rows;
}

template <class Rule, class Param, class State>
int run_case(Buffers buffers, int64_t chunk_size, std::mt19937& random) {
  using S = Compute<Param>;
  constexpr int64_t kColumns = Hyper<Rule, S>::kNumColumns, kNumbers = Hyper<Rule, S>::kNumNumbers, kRows = 6;
  const int64_t sizes[] = {0, 1, 3, 15, 16, 17, 31, 33, 64, 100, chunk_size - 1, chunk_size, 2 * chunk_size + 1};
  std::vector<Tensors<Rule, Param, State>> tensors;
  std::vector<Chunk> chunks;
  for (int64_t numel : sizes) {
    const auto index = static_cast<int32_t>(tensors.size());
    tensors.emplace_back(numel, index % 9, random);
    chunks.push_back({index, 0});
    for (int32_t c = 1; c * chunk_size < numel; ++c) chunks.push_back({index, c});
  }
  auto expected = tensors;
  std::vector<Line> table(tensors.size());
  std::vector<int64_t> grads(tensors.size());
  std::vector<std::vector<double>> numbers(tensors.size(), std::vector<double>(kNumbers, -1));
  std::vector<double> next_numbers(kRows * kNumbers);
  for (size_t i = 0; i < next_numbers.size(); ++i) next_numbers[i] = static_cast<double>(i);
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].fill(table[i], buffers);
    table[i].numel = sizes[i];
    table[i].row = static_cast<int64_t>(i) % kRows;
    table[i].numbers = i % 2 ? 0 : reinterpret_cast<int64_t>(numbers[i].data());
    grads[i] = tensors[i].grad.address();
  }
  const std::vector<S> rows = random_rows<S>(kRows, kColumns, buffers.has_grad, random);
  const Launch launch{table.data(),        buffers.has_grad ? grads.data() : nullptr,
                      rows.data(),         kColumns,
                      next_numbers.data(), kNumbers,
                      chunks.data(),       chunk_size};
  run_chunks<Rule, Param, State>(launch, 0, static_cast<int64_t>(chunks.size()));
  int n_wrong = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Hyper<Rule, S> hyper(&rows[table[i].row * kColumns]);
    const bool is_run = hyper.is_skipped == 0;
    for (int64_t e = 0; e < sizes[i] && is_run; ++e) expected[i].run_alone(e, hyper, buffers);
    n_wrong += !tensors[i].same_bits(expected[i]);
    for (int64_t k = 0; k < kNumbers; ++k) {
      n_wrong += numbers[i][k] != (is_run && i % 2 == 0 ? next_numbers[table[i].row * kNumbers + k] : -1);
    }
  }
  if (n_wrong) std::printf("%d tensors differ: %s\n", n_wrong, __PRETTY_FUNCTION__);
  return n_wrong;
}

template <class Rule, class Param, class State> int run_dtypes(std::mt19937& random) {
  int n_wrong = 0;
  for (int flags = 0; flags < 8; ++flags) {
    const bool has_master = (flags & 4) != 0 && sizeof(State) == sizeof(Compute<Param>);
    const Buffers buffers{(flags & 1) != 0, (flags & 2) != 0 && Rule::kHasOptional, has_master};
    for (int64_t chunk_size : {1, 50, 128}) n_wrong += run_case<Rule, Param, State>(buffers, chunk_size, random);
  }
  return n_wrong;
}

}  // namespace

// Where memory is touched depends on the dtypes and on the number of buffers, so one rule runs over all dtypes.
int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  const int n_wrong = run_dtypes<Adam, double, double>(random) + run_dtypes<Adam, float, float>(random) +
                      run_dtypes<Adam, BFloat16, float>(random) + run_dtypes<Adam, Float16, float>(random) +
                      run_dtypes<Adam, BFloat16, BFloat16>(random) + run_dtypes<Adam, Float16, Float16>(random) +
                      run_dtypes<Sgdm, float, float>(random) + run_dtypes<Sgdm, BFloat16, BFloat16>(random) +
                      run_dtypes<AdaBelief, float, float>(random) + run_dtypes<AdaM3, float, float>(random) +
                      run_dtypes<AdaPlus, float, float>(random) + run_dtypes<Rmsprop, float, float>(random);
  std::printf("%d wrong\n", n_wrong);
  return n_wrong != 0;
}
