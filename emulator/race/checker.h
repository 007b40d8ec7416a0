// The race checker's state: one launch at a time.
#pragma once

#include <string>

#include "emulator/machine/fail.h"
#include "emulator/race/agents.h"
#include "emulator/race/shadow.h"
#include "emulator/race/sync_objects.h"

namespace emulator::race {

class Checker {
 public:
  Shadow shadow;
  Agents agents;
  SyncObjects sync_objects;
  bool launched = false;

  // The thread that runs, or null: then the host or an asynchronous operation does.
  ThreadState* current();
  Actor actor(const ThreadState& thread, uint8_t flags) const;

  // A plain access of kernel code (callbacks.cpp). The compiler takes the callbacks for functions
  // that do not throw, so a fault is kept until the thread next enters the layer.
  void plain_access(const void* memory, size_t bytes, const void* instruction, bool writes,
                    uint8_t flags = 0);
  // Checks an access whose type is aligned to its size: a GPU makes no other.
  void check_aligned(const void* memory, size_t bytes, bool writes);

  // Throws, or keeps the first fault if it comes from a callback.
  void fault(ErrorKind kind, const std::string& text);
  void throw_kept_fault();
  bool raises_faults() const { return launched && kept_.empty(); }
  void begin_launch();
  void end_launch();

 private:
  bool in_callback_ = false;
  ErrorKind kept_kind_ = ErrorKind::Race;
  std::string kept_;
};

Checker& checker();

}  // namespace emulator::race
