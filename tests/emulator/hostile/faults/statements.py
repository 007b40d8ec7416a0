"""Statements of the clustered GEMM that several faults move, as they stand there."""

X_LOAD = """      ptx::tma_load_2d(block.x_tile(ring.slot), low_rank ? &maps.s : &maps.x, block.full(ring.slot),
                       k0, row_block * kBlockM);
"""
ACQUIRE_TILE_STAGE = "      acquire_stage(ring, Plan::kXBytes + Plan::kWBytes);\n"
ACQUIRE_S = "      if (low_rank) acquire_s(row_block);\n"
S_PROXY_FENCE = '    if (!Fault::skip("producer.s_proxy_fence")) ptx::fence_proxy_async_global();\n'
S_WAIT = (
    '    while (!Fault::skip("producer.s_wait") && ptx::load_acquire_gpu(p.s_ready + row_block) <\n'
)
EXPECT = """    if (!Fault::skip("producer.expect")) {
      ptx::mbarrier_arrive_expect_tx(
          block.full(ring.slot), Fault::count("producer.bytes", bytes, bytes - 128, bytes + 128));
    }
"""
EMPTY_COUNT = """Fault::count("setup.empty_count", kClusterSize * kWarps,
                                          kClusterSize * kWarps - 1, kClusterSize * kWarps + 1)"""
RELEASE = """      if (!Fault::skip("consumer.release")) ptx::mbarrier_arrive_cluster(block.empty(slot), lane);
"""
S_FENCE = '      if (!Fault::skip("consumer.s_wgmma_fence")) ptx::wgmma_fence();\n'
S_FRAGMENTS = "      uint32_t fragments[kBlockK / 16][4];\n"
S_LOADS = """#pragma unroll
      for (int k16 = 0; k16 < kBlockK / 16; ++k16)
        load_fragment(fragments[k16], block.x_tile(ring.slot), k16);
"""
S_WAIT_GROUP = """      if (Fault::swap("consumer.s_wait_one_group_less")) {
        ptx::wgmma_wait_group<1>();
      } else if (!Fault::skip("consumer.s_wait")) {
        ptx::wgmma_wait_group<0>();
      }
      if (!Fault::skip("consumer.s_syncwarp")) __syncwarp();  // every lane has read its fragments
      release_stage(ring.slot);
"""
S_COMMIT = '      if (!Fault::skip("consumer.s_commit")) ptx::wgmma_commit_group();\n'
TILE_FENCE = '    if (!Fault::skip("consumer.wgmma_fence")) ptx::wgmma_fence();\n'
TILE_WAIT = """      if (Fault::swap("consumer.wait_one_group_less")) {
        ptx::wgmma_wait_group<2>();
      } else if (!Fault::skip("consumer.wait_previous")) {
        ptx::wgmma_wait_group<1>();
      }
"""
TILE_RELEASE = (
    '      if (Fault::flag("consumer.has_previous", step > 0)) release_stage(previous);\n'
)
LAST_WAIT = """    if (Fault::swap("consumer.wait_last_one_less")) {
      ptx::wgmma_wait_group<1>();
    } else if (!Fault::skip("consumer.wait_last")) {
      ptx::wgmma_wait_group<0>();
    }
"""
LAST_RELEASES = """    release_stage(previous);
    release_stage(ring.slot);
"""
PUBLISH_BARRIER = '    if (!Fault::skip("consumer.s_barrier")) warpgroup_barrier();\n'
PUBLISH = """    if (Fault::flag("consumer.s_publisher", thread == 0)) {
      if (!Fault::skip("consumer.s_publish")) ptx::atomic_add_release_gpu(p.s_ready + row_block, 1);
    }
"""
GRID_WAIT = """    if (!Fault::skip("epilogue.grid_wait"))
      ptx::griddepcontrol_wait();  // the bias is the grid before's
"""
SLAB_WAIT = """      if (Fault::value("epilogue.waiter", thread == 0, false)) {
        // At most the store of the other slab may still read.
        if (Fault::swap("epilogue.wait_one_group_less")) {
          ptx::bulk_wait_group_read<Plan::kSlabs>();
        } else if (!Fault::skip("epilogue.wait_read")) {
          ptx::bulk_wait_group_read<Plan::kSlabs - 1>();
        }
      }
"""
SLAB_FREE = '      if (!Fault::skip("epilogue.slab_free")) warpgroup_barrier();\n'
STORE_FENCE = '      if (!Fault::skip("epilogue.proxy_fence")) ptx::fence_proxy_async_shared();\n'
SLAB_FULL = '      if (!Fault::skip("epilogue.slab_full")) warpgroup_barrier();\n'
STORE = """        ptx::tma_store_2d(&maps.y, staging, column0, row_block * kBlockM + consumer * 64);
"""
STORE_COMMIT = '        if (!Fault::skip("epilogue.commit")) ptx::bulk_commit_group();\n'
STORER = '      if (Fault::flag("epilogue.storer", thread == 0)) {\n'
STMATRIX = "        ptx::stmatrix_x4(staging + row * Plan::kRowBytes + chunk * 16, packed);\n"
BIAS = """          const float low =
              Fault::flag("epilogue.bias_low", column < columns) ? p.bias[column] : 0.f;
          const float high =
              Fault::flag("epilogue.bias_high", column + 1 < columns) ? p.bias[column + 1] : 0.f;
"""
TICKET_READ = """    const int ticket = static_cast<int>(
        ptx::load_shared_cluster<uint32_t>(shared + Plan::kTicket + 4 * ring.slot));
"""
TICKET_SYNC = """    if (Fault::flag("ticket.warp", consumer >= 0)) {
      if (!Fault::skip("ticket.syncwarp")) __syncwarp();  // every lane has read it
    }
"""
TICKET_RELEASE = """    if (Fault::flag("ticket.reader", reader)) {
      if (!Fault::skip("ticket.arrive_empty"))
        ptx::mbarrier_arrive_cluster(ticket_empty(ring.slot), 0);
    }
"""
TICKET_WAIT = """      ptx::mbarrier_wait_cluster(ticket_full(ring.slot),
                                 Fault::value("ticket.parity", ring.parity, ring.parity ^ 1));
"""
SCHEDULER_WAIT = """      if (!Fault::skip("scheduler.wait_empty")) {
        ptx::mbarrier_wait(block.ticket_empty(ring.slot),
                           Fault::value("scheduler.parity", ring.parity ^ 1, ring.parity));
      }
"""
TICKET_STORE = "        ptx::store_shared_cluster<uint32_t>(target, ticket);\n"
TICKET_ARRIVE = """        if (!Fault::skip("scheduler.arrive_full")) {
          ptx::mbarrier_arrive_cluster(block.ticket_full(ring.slot), to);
        }
"""
FENCE_INIT = '      if (!Fault::skip("setup.fence_init")) ptx::fence_mbarrier_init();\n'
SETUP_THREAD = '    if (Fault::flag("setup.thread", threadIdx.x == 0)) {\n'
SETUP_ARRIVE = '      if (!Fault::skip("setup.cluster_arrive")) ptx::cluster_arrive();\n'
FINISH_FENCE = '    if (!Fault::skip("finish.cluster_fence")) ptx::fence_acq_rel_cluster();\n'
FINISH_ARRIVE = '    if (!Fault::skip("finish.arrive")) ptx::cluster_arrive_relaxed();\n'
FINISH_WAIT = '    if (!Fault::skip("finish.wait")) ptx::cluster_wait();\n'
FINISH_GRID = (
    '    if (Fault::flag("finish.thread", rank == 0 && threadIdx.x == 0)) finish_grid();\n'
)
LEAVE_ARRIVE = '    if (!Fault::skip("finish.leave_arrive")) ptx::cluster_arrive();\n'
LEAVE_WAIT = '    if (!Fault::skip("finish.leave_wait")) ptx::cluster_wait();\n'
AMAX_STORE = """    if (Fault::flag("consumer.amax_writer", lane == 0)) {
      ptx::store_shared_cluster<float>(block.shared + Plan::kAmax + 4 * (consumer * 4 + warp),
                                       amax);
    }
"""
PRODUCER_DEC = "      ptx::setmaxnreg_dec<kProducerRegisters>();\n"
SCHEDULE = (
    '    if (Fault::flag("role.scheduler", block.rank == 0 && threadIdx.x == 32)) '
    "producer.schedule();\n"
)
