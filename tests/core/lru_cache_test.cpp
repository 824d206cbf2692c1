#include "core/lru_cache.h"

#include <gtest/gtest.h>

#include <string>

namespace bitfall {
namespace {

TEST(LruCache, CreatesOnceAndForgetsWhatWasNotUsedForLongest) {
  LruCache<int, std::string> cache(2);
  int created = 0;
  const auto get = [&](int key) {
    return cache.get(key, [&] {
      ++created;
      return std::to_string(key);
    });
  };
  EXPECT_EQ(get(1), "1");
  EXPECT_EQ(get(2), "2");
  EXPECT_EQ(get(1), "1");
  EXPECT_EQ(created, 2);
  EXPECT_EQ(get(3), "3");  // evicts 2
  EXPECT_EQ(cache.size(), 2u);
  EXPECT_EQ(get(1), "1");
  EXPECT_EQ(created, 3);
  EXPECT_EQ(get(2), "2");
  EXPECT_EQ(created, 4);
}

TEST(LruCache, KeepsItsStateWhenCreationThrows) {
  LruCache<int, int> cache(2);
  EXPECT_THROW(cache.get(1, []() -> int { throw 5; }), int);
  EXPECT_EQ(cache.get(1, [] { return 7; }), 7);
}

}  // namespace
}  // namespace bitfall
