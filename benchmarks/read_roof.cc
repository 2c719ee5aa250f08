// read_sum: the sum of a buffer's words by several threads, which takes as long as reading it.

#include <cstdint>
#include <thread>
#include <vector>

extern "C" uint64_t read_sum(const uint64_t* words, int64_t count, int threads) {
  std::vector<uint64_t> sums(threads);
  const auto part = [&](int i) {
    const int64_t begin = count / threads * i, end = begin + count / threads;
    uint64_t sum[16] = {};
    for (int64_t at = begin; at + 16 <= end; at += 16) {
      __builtin_prefetch(words + at + 256);
      __builtin_prefetch(words + at + 264);
      for (int j = 0; j < 16; ++j) sum[j] += words[at + j];
    }
    for (const uint64_t s : sum) sums[i] += s;
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(part, i);
  part(0);
  for (auto& helper : helpers) helper.join();
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  return total;
}
