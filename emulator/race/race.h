// The hooks of the race checker. The core and the asynchronous units call them; race.cpp implements
// them. Without EMULATOR_RACE they are empty and cost nothing.
//
// Every thread has a clock G (what it may access as a thread) and, for shared and for global
// memory, a clock P (what an asynchronous operation that it issues may access): fence.proxy.async
// sets P to G. A release publishes both into the sync object, an acquire joins both. An
// asynchronous operation starts with P of its issuer for what was written, and with G for earlier
// reads of what it overwrites. Sync objects are named by an address.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

struct Thread;
struct Block;
struct Grid;

enum class Space { Shared, Global };
enum class Scope { Block, Cluster, Gpu };
enum class AtomicAccess { Load, Store, ReadModifyWrite };
/// Bulk copies and wgmma access memory through the async proxy; cp.async of 4, 8 or 16 bytes does
/// not (PTX ISA "Proxies").
enum class Proxy { Generic, Async };

/// Join: adds the releaser's clock to what the object holds (barriers, counters,
/// read-modify-writes). Replace: the object holds the releaser's clock alone (a release store
/// starts a new release sequence).
enum class ReleaseMode { Join, Replace };

/// One asynchronous operation as an agent of its own.
struct AsyncAgent {
  uint32_t id = 0;
};

#ifdef EMULATOR_RACE

/// A run of grids begins: every access before it (by the host) happens before everything in it. /
/// It is over or has failed.
void race_launch_begin();
void race_launch_end();

/// Called by a thread as its first and last act. The thread starts knowing nothing but the host's
/// accesses; the core then calls race_acquire for what else precedes it (the grid before it in the
/// stream), and race_proxy_fence where that order holds across proxies.
void race_thread_begin(Thread& thread);
void race_thread_end(Thread& thread);

/// `memory` becomes a block's shared memory, with undefined contents (a new block, on recycled
/// memory). / It no longer belongs to any block.
void race_shared_begin(const void* memory, size_t bytes);
void race_shared_end(const void* memory, size_t bytes);

/// A buffer in global memory with `guard_bytes` on either side that must not be accessed.
/// `initialised`: the host has filled it; else reading what nothing wrote is a fault. / It is
/// freed.
void race_global_begin(const void* memory, size_t bytes, size_t guard_bytes, const char* name,
                       bool initialised);
void race_global_end(const void* memory);
/// The host writes to a buffer, between launches.
void race_host_write(const void* memory, size_t bytes);

/// Called by the current thread, or for another thread on whose behalf a warp or block operation is
/// performed.
void race_release(const void* sync, ReleaseMode mode = ReleaseMode::Join);
void race_acquire(const void* sync);
void race_release(Thread& thread, const void* sync, ReleaseMode mode = ReleaseMode::Join);
/// An arrival whose scope does not include the waiting threads: it releases only that operations of
/// the async proxy are complete, and only to operations that overwrite their operands
/// (performed, in race/agents.h). It releases no generic accesses.
void race_release_finished(const void* sync);
/// A relaxed arrival: releases only what the current thread's fences of at least this scope
/// precede.
void race_release_fenced(const void* sync, Scope scope);
/// What `sync` has gathered becomes part of what such an arrival releases, at cluster scope.
void race_fence_only(const void* sync);
void race_acquire(Thread& thread, const void* sync);
/// As race_acquire, but what the releasers wrote need not be visible: an acquire of a scope that
/// leaves them out. Orders later writes after their accesses.
void race_acquire_performed(const void* sync);
/// The address no longer names that sync object (it is freed, or its memory is reused).
void race_forget(const void* sync);

/// fence.proxy.async by the current thread.
void race_proxy_fence(Space space);
/// fence.acq_rel by the current thread: orders relaxed atomics around it (race_atomic).
void race_fence(Scope scope);

/// Accesses that the layer makes on behalf of the current thread. `what` is the instruction, and
/// outlives the launch.
void race_read(const void* pointer, size_t bytes, const char* what);
void race_write(const void* pointer, size_t bytes, const char* what);
/// The current thread accesses the shared memory of another block (or of its own): that block must
/// not exit before it knows that the access is over.
void race_peer_access(const Block& peer, const char* what);
/// A relaxed atomic access by the current thread: races only with plain accesses. Acquire and
/// release come separately, after it.
void race_atomic(const void* pointer, size_t bytes, AtomicAccess access, const char* what);

/// Called at issue, by the issuing thread, once for each completion that can be waited for on its
/// own (a bulk store completes its reads and its writes apart, a multicast each destination). /
/// Other lanes that take part in the issue released into `sync`. / When the operation takes effect.
/// / When it signals, once: releases its clock into `sync`.
AsyncAgent race_fork_async(Proxy proxy = Proxy::Async);
void race_async_acquire(AsyncAgent agent, const void* sync);
void race_async_read(AsyncAgent agent, const void* pointer, size_t bytes, const char* what);
void race_async_write(AsyncAgent agent, const void* pointer, size_t bytes, const char* what);
void race_async_complete(AsyncAgent agent, const void* sync);

/// While on, only the operation itself may access these bytes.
void race_in_flight(const void* pointer, size_t bytes, bool on);

#else

inline void race_launch_begin() {}
inline void race_launch_end() {}
inline void race_thread_begin(Thread&) {}
inline void race_thread_end(Thread&) {}
inline void race_shared_begin(const void*, size_t) {}
inline void race_shared_end(const void*, size_t) {}
inline void race_global_begin(const void*, size_t, size_t, const char*, bool) {}
inline void race_global_end(const void*) {}
inline void race_host_write(const void*, size_t) {}
inline void race_release(const void*, ReleaseMode = ReleaseMode::Join) {}
inline void race_acquire(const void*) {}
inline void race_acquire_performed(const void*) {}
inline void race_release(Thread&, const void*, ReleaseMode = ReleaseMode::Join) {}
inline void race_fence_only(const void*) {}
inline void race_release_finished(const void*) {}
inline void race_release_fenced(const void*, Scope) {}
inline void race_acquire(Thread&, const void*) {}
inline void race_forget(const void*) {}
inline void race_proxy_fence(Space) {}
inline void race_fence(Scope) {}
inline void race_read(const void*, size_t, const char*) {}
inline void race_write(const void*, size_t, const char*) {}
inline void race_peer_access(const Block&, const char*) {}
inline void race_atomic(const void*, size_t, AtomicAccess, const char*) {}
inline AsyncAgent race_fork_async(Proxy = Proxy::Async) { return {}; }
inline void race_async_acquire(AsyncAgent, const void*) {}
inline void race_async_read(AsyncAgent, const void*, size_t, const char*) {}
inline void race_async_write(AsyncAgent, const void*, size_t, const char*) {}
inline void race_async_complete(AsyncAgent, const void*) {}
inline void race_in_flight(const void*, size_t, bool) {}

#endif

}  // namespace emulator
