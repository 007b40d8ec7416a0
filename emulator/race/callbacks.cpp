// The functions that a compiler calls for every memory access of a unit built with
// -fsanitize=thread. They stand in for libtsan: link without -fsanitize=thread. GCC 12 to 14 and
// clang use the same names; clang also turns memcpy, memmove and memset into calls of its own.
//
// Rules for kernel code: a volatile access is a relaxed atomic one of system scope (PTX ISA "ld",
// .volatile), so polling a flag through volatile is no race, but neither does it order anything
// without a fence. Every other access is plain: two of them without a happens-before order between
// them are a race as soon as one writes, also if both write the same value.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emulator/race/checker.h"
#include "emulator/race/race.h"

namespace {

using emulator::AtomicAccess;

void read(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::checker().plain_access(memory, bytes, instruction, /*writes=*/false);
}

void write(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::checker().plain_access(memory, bytes, instruction, /*writes=*/true);
}

// The compiler calls these for types that are aligned to their size, or to 8 bytes.
void read_aligned(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::checker().check_aligned(memory, bytes < 8 ? bytes : 8, /*writes=*/false);
  read(memory, bytes, instruction);
}

void write_aligned(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::checker().check_aligned(memory, bytes < 8 ? bytes : 8, /*writes=*/true);
  write(memory, bytes, instruction);
}

void read_volatile(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::Checker& checker = emulator::race::checker();
  checker.plain_access(memory, bytes, instruction, /*writes=*/false, emulator::race::kAtomic);
  if (auto* thread = checker.current(); thread && checker.shadow.find(memory))
    checker.sync_objects.atomic(*thread, memory, AtomicAccess::Load);
}

void write_volatile(const void* memory, size_t bytes, const void* instruction) {
  emulator::race::Checker& checker = emulator::race::checker();
  checker.plain_access(memory, bytes, instruction, /*writes=*/true, emulator::race::kAtomic);
  if (auto* thread = checker.current(); thread && checker.shadow.find(memory))
    checker.sync_objects.atomic(*thread, memory, AtomicAccess::Store);
}

// The compiler's atomics (std::atomic_ref and __atomic builtins in kernel code). The memory order
// is GCC's __ATOMIC_ constant.
void atomic(const volatile void* memory, size_t bytes, AtomicAccess access, int order,
            const void* instruction) {
  emulator::race::Checker& checker = emulator::race::checker();
  const void* address = const_cast<const void*>(memory);
  auto* thread = checker.current();
  if (!thread || !checker.shadow.find(address)) return;
  checker.plain_access(address, bytes, instruction, /*writes=*/access != AtomicAccess::Load,
                       emulator::race::kAtomic);
  const bool acquires = order == __ATOMIC_ACQUIRE || order == __ATOMIC_CONSUME ||
                        order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  const bool releases =
      order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  checker.sync_objects.atomic(*thread, address, access);
  if (acquires && access != AtomicAccess::Store) checker.sync_objects.acquire(*thread, address);
  if (releases && access != AtomicAccess::Load)
    checker.sync_objects.release(*thread, address,
                                 access == AtomicAccess::Store ? emulator::ReleaseMode::Replace
                                                               : emulator::ReleaseMode::Join);
}

}  // namespace

#define CALLER __builtin_return_address(0)

#define ACCESSES_OF(BYTES)                                                                   \
  void __tsan_read##BYTES(void* p) { read_aligned(p, BYTES, CALLER); }                       \
  void __tsan_write##BYTES(void* p) { write_aligned(p, BYTES, CALLER); }                     \
  void __tsan_unaligned_read##BYTES(void* p) { read(p, BYTES, CALLER); }                     \
  void __tsan_unaligned_write##BYTES(void* p) { write(p, BYTES, CALLER); }                   \
  void __tsan_volatile_read##BYTES(void* p) { read_volatile(p, BYTES, CALLER); }             \
  void __tsan_volatile_write##BYTES(void* p) { write_volatile(p, BYTES, CALLER); }           \
  void __tsan_unaligned_volatile_read##BYTES(void* p) { read_volatile(p, BYTES, CALLER); }   \
  void __tsan_unaligned_volatile_write##BYTES(void* p) { write_volatile(p, BYTES, CALLER); } \
  void __tsan_read_write##BYTES(void* p) {                                                   \
    read_aligned(p, BYTES, CALLER);                                                          \
    write_aligned(p, BYTES, CALLER);                                                         \
  }                                                                                          \
  void __tsan_unaligned_read_write##BYTES(void* p) {                                         \
    read(p, BYTES, CALLER);                                                                  \
    write(p, BYTES, CALLER);                                                                 \
  }

#define READ_MODIFY_WRITE(BITS, TYPE, NAME)                                    \
  TYPE __tsan_atomic##BITS##_##NAME(volatile TYPE* p, TYPE value, int order) { \
    atomic(p, BITS / 8, AtomicAccess::ReadModifyWrite, order, CALLER);         \
    return __atomic_##NAME(p, value, __ATOMIC_SEQ_CST);                        \
  }

#define COMPARE_EXCHANGE(BITS, TYPE, STRENGTH)                                            \
  int __tsan_atomic##BITS##_compare_exchange_##STRENGTH(volatile TYPE* p, TYPE* expected, \
                                                        TYPE value, int order, int) {     \
    atomic(p, BITS / 8, AtomicAccess::ReadModifyWrite, order, CALLER);                    \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,       \
                                       __ATOMIC_SEQ_CST);                                 \
  }

#define ATOMICS_OF(BITS, TYPE)                                                                   \
  TYPE __tsan_atomic##BITS##_load(const volatile TYPE* p, int order) {                           \
    atomic(p, BITS / 8, AtomicAccess::Load, order, CALLER);                                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                              \
  void __tsan_atomic##BITS##_store(volatile TYPE* p, TYPE value, int order) {                    \
    atomic(p, BITS / 8, AtomicAccess::Store, order, CALLER);                                     \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                              \
  TYPE __tsan_atomic##BITS##_exchange(volatile TYPE* p, TYPE value, int order) {                 \
    atomic(p, BITS / 8, AtomicAccess::ReadModifyWrite, order, CALLER);                           \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                      \
  }                                                                                              \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_add)                                                       \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_sub)                                                       \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_and)                                                       \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_or)                                                        \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_xor)                                                       \
  READ_MODIFY_WRITE(BITS, TYPE, fetch_nand)                                                      \
  COMPARE_EXCHANGE(BITS, TYPE, strong)                                                           \
  COMPARE_EXCHANGE(BITS, TYPE, weak)                                                             \
  TYPE __tsan_atomic##BITS##_compare_exchange_val(volatile TYPE* p, TYPE expected, TYPE value,   \
                                                  int order, int) {                              \
    atomic(p, BITS / 8, AtomicAccess::ReadModifyWrite, order, CALLER);                           \
    __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    return expected;                                                                             \
  }

extern "C" {

ACCESSES_OF(1)
ACCESSES_OF(2)
ACCESSES_OF(4)
ACCESSES_OF(8)
ACCESSES_OF(16)

void __tsan_read_range(void* p, size_t bytes) { read(p, bytes, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { write(p, bytes, CALLER); }

ATOMICS_OF(8, uint8_t)
ATOMICS_OF(16, uint16_t)
ATOMICS_OF(32, uint32_t)
ATOMICS_OF(64, uint64_t)

void __tsan_atomic_thread_fence(int) {
  if (auto* thread = emulator::race::checker().current())
    emulator::race::checker().sync_objects.fence(*thread, emulator::Scope::Gpu);
}
void __tsan_atomic_signal_fence(int) {}

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  read(from, bytes, CALLER);
  write(to, bytes, CALLER);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  read(from, bytes, CALLER);
  write(to, bytes, CALLER);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  write(to, bytes, CALLER);
  return std::memset(to, value, bytes);
}

// Start of a unit, functions, virtual tables: nothing to check.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
