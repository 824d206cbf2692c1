// What a test program of several ranks does when started with --fail.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/communicator.h"
#include "tests/support/tiny_engine.h"

namespace bitfall::test {

/// main() of such a program: the tests; with --fail a malformed batch on the last rank, which must
/// end all ranks in the middle of their reductions.
template <typename MakeEngine>
int run_tests_or_fail(int argc, char** argv, Communicator& world, MakeEngine&& make_engine) {
  testing::InitGoogleTest(&argc, argv);
  if (argc < 2 || std::string(argv[1]) != "--fail") return RUN_ALL_TESTS();
  const auto engine = make_engine();
  Batch batch = tiny_batch(0, 1);
  if (world.rank() == world.world_size() - 1) batch.input_ids[0] = 4000;
  try {
    engine->train_batch(std::vector<Batch>{batch});
  } catch (const std::exception& error) {
    world.abort(error.what());
  }
  return 0;
}

}  // namespace bitfall::test
