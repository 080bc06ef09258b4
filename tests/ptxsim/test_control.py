"""Threads part, meet and wait as a GPU's do; what would hang or trap there is an error here."""

import struct

import numpy
import pytest

from ptxsim import BarrierError, Memory, PTXSyntaxError, StepLimitError, TrapError, load_ptx
from ptxsim.programs import F32, U32, apart, compiled, run_block

THREADS = numpy.arange(64)


def test_threads_that_wait_for_ever_are_an_error():
    with pytest.raises(BarrierError, match="32 of 64"):
        run_block("setp.lt.u32 p, t, 32; @p bra A; bra B; A: bar.sync 0; B: bar.sync 1;")
    with pytest.raises(BarrierError, match="wait for other lanes"):
        run_block("setp.lt.u32 p, t, 7; @p bar.sync 1; shfl.sync.bfly.b32 v|q, t, 1, 31, -1;", n_threads=32)
    with pytest.raises(StepLimitError):
        run_block("L: add.u32 v, v, 1; bra L;", max_steps=10000)


def test_traps_say_which_thread():
    with pytest.raises(TrapError, match=r"thread \(7, 0, 0\)"):
        run_block("setp.eq.u32 p, t, 7; @p trap;")


def test_what_is_not_implemented_is_an_error_where_it_is_reached():
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {v,v,v,v}, {v,v,v,v}, {v,v}, {v,v,v,v};"
    with pytest.raises(NotImplementedError, match="mma"):
        run_block(mma)
    assert run_block("bra S; wgmma.fence.sync.aligned; S: mov.u32 v, 1;")[0] == 1
    assert run_block("{ .param .b64 p0; st.param.b64 [p0], a; } mov.u32 v, 3;")[0] == 3
    with pytest.raises(PTXSyntaxError):
        load_ptx(".visible .entry k() { mov.u32 ; ~ }")


FUNCTIONS = """.func (.param .b32 result) twice (.param .b32 value);
.visible .entry k(.param .u64 out)
{ .reg .b64 a; .reg .b32 t, v; .reg .pred p; mov.u32 t, %tid.x; ld.param.u64 a, [out]; mad.wide.u32 a, t, 4, a;
  mov.u32 v, t; setp.lt.u32 p, t, 40;
  { .param .b32 x; .param .b32 y; st.param.b32 [x], v; @p call.uni (y), twice, (x); @p ld.param.b32 v, [y]; }
  { .param .b32 x; .param .b32 y; st.param.b32 [x], v; call.uni (y), twice, (x); ld.param.b32 v, [y]; }
  st.global.u32 [a], v; ret; }
.func (.param .b32 result) twice (.param .b32 value)
{ .reg .b32 v; .reg .pred p; ld.param.b32 v, [value]; setp.gt.u32 p, v, 100; @p bra BIG;
  add.u32 v, v, v; st.param.b32 [result], v; ret;
  BIG: st.param.b32 [result], 7; ret; }"""


def test_device_functions():
    """Called twice, once by some of the threads; each call has two ways back."""
    out = numpy.zeros(64, U32)
    memory = Memory()
    memory.register(out, "out")
    compiled(FUNCTIONS).launch(1, 64, [out], memory)
    once = numpy.where(THREADS < 40, 2 * THREADS, THREADS)
    numpy.testing.assert_array_equal(out, numpy.where(once > 100, 7, 2 * once))


def test_unsupported_and_contractible():
    kernel = compiled(""".visible .entry k() { .reg .f32 f<3>; .reg .b32 r; bra E; wgmma.fence.sync.aligned;
  mul.f32 f0, f1, f2; add.rn.f32 f0, f0, f1; E: ret; }""")
    (message,) = kernel.unsupported()
    assert "wgmma" in message
    assert [text.split()[0] for _, text in kernel.contractible()] == ["mul.f32"]


def test_threads_that_have_left_are_not_waited_for():
    out = run_block("setp.lt.u32 p, t, 10; @p ret; bar.sync 0; mov.u32 v, 5;")
    assert (out[:10] == 0).all() and (out[10:] == 5).all()


def test_halves_of_a_block_reach_a_barrier_through_different_branches():
    out = run_block("""mov.u32 x, s; mad.lo.u32 x, t, 4, x; setp.lt.u32 p, t, 32; @p bra LOW;
      mul.lo.u32 w, t, 3; st.shared.u32 [x], w; bra J;
      LOW: mul.lo.u32 w, t, 7; st.shared.u32 [x], w;
      J: bar.sync 0; mov.u32 x, s; sub.u32 w, 63, t; mad.lo.u32 x, w, 4, x; ld.shared.u32 v, [x];""")
    other = 63 - THREADS
    numpy.testing.assert_array_equal(out, numpy.where(other < 32, other * 7, other * 3))


@pytest.mark.parametrize(
    ("operation", "initial", "expected"),
    [("add", 0, 64 * 63 // 2), ("max", 5, 63), ("min", 5, 0), ("or", 0, 63), ("exch", 9, 63), ("inc", 0, None)],
)
def test_atomics_in_shared_memory(operation, initial, expected):
    kind = "b32" if operation in ("or", "exch") else "u32"
    out = run_block(f"""mov.u32 x, s; setp.eq.u32 p, t, 0; @p st.shared.u32 [x], {initial}; bar.sync 0;
      atom.shared.{operation}.{kind} w, [x], t; bar.sync 0; ld.shared.u32 v, [x];""")
    assert (out == out[0]).all() and (expected is None or out[0] == expected)


def test_a_shuffle_waits_for_all_members():
    """Lanes 0 to 15 reach it late, from a block that stands after it."""
    out = run_block(
        """setp.lt.u32 p, t, 16; mov.u32 w, t; @p bra LATE;
      J: shfl.sync.bfly.b32 v|q, w, 16, 31, -1; bra E;
      LATE: add.u32 w, t, 100; bra J;
      E: """,
        n_threads=32,
    )
    lane = numpy.arange(32)
    numpy.testing.assert_array_equal(out, numpy.where(lane < 16, lane + 16, lane - 16 + 100))


SHUFFLES = [("up", 3, 0), ("up", 2, 0x1800), ("idx", 5, 0x181F), ("down", 5, 31), ("idx", 9, 31), ("bfly", 1, 31)]
SHUFFLES += [("down", 2, 0x1807)]


@pytest.mark.parametrize(("mode", "by", "clamp"), SHUFFLES)
def test_shuffle_modes(mode, by, clamp):
    out = run_block(f"shfl.sync.{mode}.b32 v|q, t, {by}, {clamp}, 0xffffffff; @!q add.u32 v, v, 1000;")
    for thread in range(64):
        lane, segment, limit = thread & 31, clamp >> 8, clamp & 31
        lowest, highest = lane & segment, (lane & segment) | (limit & ~segment)
        other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        is_valid = other >= highest if mode == "up" else other <= highest
        expected = (thread & ~31) + (other if is_valid else lane) + (0 if is_valid else 1000)
        assert out[thread] == expected & 0xFFFFFFFF


def test_votes_matches_and_reductions():
    body = "setp.lt.u32 p, t, 40; vote.sync.ballot.b32 v, p, -1; vote.sync.all.pred q, p, -1; @q add.u32 v, v, 1;"
    out = run_block(body)
    assert (out[:32] == 0).all() and (out[32:] == 0xFF).all()  # all ones and one more are zero
    out = run_block("and.b32 w, t, 3; match.any.sync.b32 v, w, -1;")
    assert [hex(value) for value in out[:4]] == ["0x11111111", "0x22222222", "0x44444444", "0x88888888"]
    out = run_block("redux.sync.add.u32 v, t, -1;")
    assert out[0] == 496 and out[63] == 496 + 1024
    out = run_block("cvt.rn.f32.u32 w, t; redux.sync.max.f32 v, w, -1; cvt.rzi.u32.f32 v, v;")
    assert out[0] == 31 and out[32] == 63
    out = run_block("setp.lt.u32 p, t, 5; @p activemask.b32 v;")
    assert out[0] == 0x1F and out[5] == 0


def test_registers_begin_as_poison():
    assert (run_block("mov.u32 v, i;") == 0xFFF7DEAD).all()


def test_shapes_of_blocks_and_grids_and_parameters():
    kernel = compiled(""".visible .entry k(.param .u64 out, .param .align 4 .b8 s[8], .param .f32 fl)
{ .reg .b64 a; .reg .b32 r<20>; .reg .f32 f;
  mov.u32 r0, %tid.x; mov.u32 r1, %tid.y; mov.u32 r2, %ntid.x; mov.u32 r3, %ctaid.x; mov.u32 r4, %ctaid.y;
  mov.u32 r5, %nctaid.x; mad.lo.u32 r6, r1, r2, r0; mad.lo.u32 r7, r4, r5, r3; mov.u32 r8, %ntid.y;
  mul.lo.u32 r9, r8, r2; mad.lo.u32 r10, r7, r9, r6; ld.param.u64 a, [out]; mad.wide.u32 a, r10, 4, a;
  ld.param.u32 r11, [s+4]; ld.param.f32 f, [fl]; cvt.rzi.u32.f32 r12, f;
  add.u32 r13, r10, r11; add.u32 r13, r13, r12; st.global.u32 [a], r13; ret; }""")
    out = numpy.zeros(5 * 3 * 2 * 2, U32)
    memory = Memory()
    memory.register(out, "out")
    kernel.launch((2, 2), (5, 3), [out, struct.pack("<II", 1, 1000), 7.5], memory)
    numpy.testing.assert_array_equal(out, numpy.arange(60) + 1007)


COUNTDOWN = """.visible .entry k(.param .u64 out)
{ .reg .b64 a; .reg .b32 t, c, i, v, x; .reg .pred p, q; WAIT
  mov.u32 t, %tid.x; mov.u32 c, %ctaid.x; mad.lo.u32 i, c, 32, t; ld.param.u64 a, [out]; mad.wide.u32 a, i, 4, a;
  mov.u32 v, 0; add.u32 x, t, c;
  L: setp.eq.u32 p, x, 0; @p bra E; add.u32 v, v, c; sub.u32 x, x, 1; bra L;
  E: st.global.u32 [a], v; ret; }"""


def test_blocks_side_by_side_do_what_they_do_in_turn():
    """A barrier makes the simulator run one block at a time; without it, many run as one array."""
    results = []
    for wait in ("", "bar.sync 0;"):
        out = apart(numpy.zeros(150 * 32, U32))
        memory = Memory()
        memory.register(out, "out")
        stats = compiled(COUNTDOWN.replace("WAIT", wait)).launch(150, 32, [out], memory)
        results.append((out.tolist(), stats.bytes_stored, stats.store_sectors, stats.store_requests, stats.threads))
        threads = numpy.arange(150 * 32)
        numpy.testing.assert_array_equal(out, (threads % 32 + threads // 32) * (threads // 32))
    assert results[0] == results[1]


def test_a_fault_in_one_of_many_blocks_names_it():
    out = numpy.zeros(150 * 32 - 1, F32)
    memory = Memory()
    memory.register(out, "out")
    with pytest.raises(RuntimeError, match=r"block \(149, 0, 0\), thread \(31, 0, 0\)"):
        compiled(COUNTDOWN.replace("WAIT", "")).launch(150, 32, [out], memory)
