"""Loads and stores reach the right bytes, traffic is counted, and an access that is nobody's is a fault."""

import numpy
import pytest

from ptxsim import Memory, MemoryFault
from ptxsim.programs import F32, U32, apart, compiled

ENTRY = """.visible .entry k(.param .u64 src, .param .u64 dst, .param .u32 n)
{{
  .reg .b64 s, d; .reg .b32 i, t, c, b; .reg .pred p; .reg .b64 v<4>; .reg .f32 f<8>; .reg .b128 w;
  ld.param.u64 s, [src]; ld.param.u64 d, [dst]; ld.param.u32 t, [n];
  mov.u32 i, %tid.x; mov.u32 c, %ctaid.x; mov.u32 b, %ntid.x; mad.lo.u32 i, c, b, i;
  setp.ge.u32 p, i, t; @p bra DONE;
  mad.wide.u32 s, i, {width}, s; mad.wide.u32 d, i, {width}, d;
  {load}
  {store}
DONE:
  ret;
}}
"""
UNPACK = " mov.b64 {f0, f1}, v0; mov.b64 {f2, f3}, v1; mov.b64 {f4, f5}, v2; mov.b64 {f6, f7}, v3;"
COPIES = {
    4: ("ld.global.nc.L1::no_allocate.f32 f0, [s];", "st.global.cs.f32 [d], f0;"),
    8: ("ld.v2.f32 {f0, f1}, [s];", "st.v2.f32 [d], {f0, f1};"),
    16: ("ld.global.b128 w, [s+0];", "st.global.b128 [d], w;"),
    32: ("ld.global.v4.b64 {v0, v1, v2, v3}, [s];" + UNPACK, "st.global.v8.f32 [d], {f0, f1, f2, f3, f4, f5, f6, f7};"),
}


def copy_kernel(width: int = 4):
    load, store = COPIES[width]
    return compiled(ENTRY.format(width=width, load=load, store=store))


def memory_of(**arrays: numpy.ndarray) -> Memory:
    memory = Memory()
    for name, array in arrays.items():
        memory.register(array, name)
    return memory


@pytest.mark.parametrize("width", COPIES)
def test_copies_and_their_counts(width):
    n = 200
    src = apart(numpy.random.default_rng(0).standard_normal(n * width // 4).astype(F32))
    dst = apart(numpy.zeros_like(src))
    memory = Memory()
    memory.register(src, "src", writable=False)
    memory.register(dst, "dst")
    stats = copy_kernel(width).launch(2, 128, [src, dst, n], memory)
    numpy.testing.assert_array_equal(src, dst)
    assert (stats.bytes_loaded, stats.bytes_stored) == (n * width, n * width)
    assert stats.load_requests_by_width == {width: 7} and stats.load_accesses_by_width == {width: n}
    assert stats.load_sectors == -(-n * width // 32) and stats.store_sectors == stats.load_sectors
    loaded, stored = stats.by_buffer["src"], stats.by_buffer["dst"]
    assert (loaded.distinct_loaded, loaded.distinct_stored) == (n * width, 0)
    assert (stored.distinct_loaded, stored.distinct_stored) == (0, n * width)
    assert stats.threads == 256 and stats.max_instructions >= 14 and stats.by_opcode["ret"] == 256
    assert "k: 2 blocks" in str(stats)


def test_traffic_need_not_be_counted():
    src, dst = numpy.arange(64, dtype=F32), numpy.zeros(64, F32)
    stats = copy_kernel().launch(1, 64, [src, dst, 64], memory_of(src=src, dst=dst), counts_traffic=False)
    numpy.testing.assert_array_equal(src, dst)
    assert stats.by_buffer == {} and stats.bytes_loaded == 0 and stats.by_opcode["ret"] == 64


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (16, 32), (0, 1), (-1, 4), (-4, 16)], ids=str)
def test_sectors_of_strided_loads(stride, sectors):
    load = f"mul.lo.u32 i, i, {stride}; ld.param.u64 s, [src]; mad.wide.s32 s, i, 4, s; ld.global.f32 f0, [s];"
    kernel = compiled(ENTRY.format(width=4, load=load, store="st.global.f32 [d], f0;"))
    src, dst = apart(numpy.arange(1024, dtype=F32)), apart(numpy.zeros(64, F32))
    start = 511 if stride < 0 else 0
    stats = kernel.launch(1, 64, [src.ctypes.data + 4 * start, dst, 64], memory_of(src=src, dst=dst))
    assert stats.sectors_per_load_request == sectors and stats.sectors_per_store_request == 4
    assert stats.by_buffer["src"].distinct_loaded == 4 * (64 if stride else 1)
    numpy.testing.assert_array_equal(dst, start + stride * numpy.arange(64))


def test_sectors_of_interleaved_lanes():
    """Even lanes read the first half and odd ones the second: 4 sectors, visited out of order."""
    load = """and.b32 t, i, 1; shr.u32 c, i, 1; mad.lo.u32 i, t, 16, c; ld.param.u64 s, [src];
      mad.wide.s32 s, i, 4, s; ld.global.f32 f0, [s];"""
    kernel = compiled(ENTRY.format(width=4, load=load, store="st.global.f32 [d], f0;"))
    src, dst = apart(numpy.arange(32, dtype=F32)), apart(numpy.zeros(32, F32))
    stats = kernel.launch(1, 32, [src, dst, 32], memory_of(src=src, dst=dst))
    assert stats.load_sectors == 4 and stats.store_sectors == 4 and dst[:4].tolist() == [0, 16, 1, 17]


def test_one_request_over_two_buffers_and_two_spaces():
    """Lanes load from two buffers in turn, then some from global and some from shared memory by generic addresses."""
    first, second, out = numpy.arange(32, dtype=U32), numpy.arange(100, 132, dtype=U32), numpy.zeros(32, U32)
    kernel = compiled(""".visible .entry k(.param .u64 a, .param .u64 b, .param .u64 out)
{ .reg .b64 x, y, z, o; .reg .b32 t, u, v, w; .reg .pred p, q; .shared .align 8 .b8 s[256];
  ld.param.u64 x, [a]; ld.param.u64 y, [b]; ld.param.u64 z, [out]; mov.u32 t, %tid.x; and.b32 u, t, 1;
  setp.eq.u32 p, u, 0; selp.b64 o, x, y, p; mad.wide.u32 o, t, 4, o; ld.global.u32 v, [o];
  mov.u64 y, s; cvta.shared.u64 y, y; mad.wide.u32 y, t, 8, y; add.u32 u, t, 1000; st.u32 [y+4], u; bar.sync 0;
  setp.lt.u32 q, t, 8; selp.b64 o, o, y, q; @!q add.u64 o, o, 4; ld.u32 w, [o]; mad.lo.u32 v, v, 10000, w;
  mad.wide.u32 z, t, 4, z; st.u32 [z], v; ret; }""")
    stats = kernel.launch(1, 32, [first, second, out], memory_of(a=first, b=second, out=out))
    lane = numpy.arange(32)
    loaded = numpy.where(lane % 2 == 0, first, second)
    numpy.testing.assert_array_equal(out, loaded * 10000 + numpy.where(lane < 8, loaded, 1000 + lane))
    for name in "ab":
        traffic = stats.by_buffer[name]
        assert (traffic.loaded, traffic.load_requests) == (4 * (16 + 4), 2)


def test_accesses_out_of_bounds_fault():
    kernel = copy_kernel()
    src, dst = apart(numpy.zeros(200, F32)), apart(numpy.zeros(199, F32))
    with pytest.raises(MemoryFault) as caught:
        kernel.launch(2, 128, [src, dst, 200], memory_of(src=src, dst=dst))
    fault = caught.value
    assert (fault.reason, fault.kernel, fault.width) == ("out-of-bounds store", "k", 4)
    assert (fault.block, fault.thread, fault.address) == ((1, 0, 0), (71, 0, 0), dst.ctypes.data + 4 * 199)
    assert "'dst'" in fault.nearest and "ends 0 bytes before" in str(fault)
    assert fault.instruction == "st.global.cs.f32 [d], f0" and fault.line == 12
    with pytest.raises(MemoryFault, match="out-of-bounds load"):
        kernel.launch(1, 32, [0, dst, 32], memory_of(dst=dst))
    with pytest.raises(MemoryFault, match="none registered"):
        kernel.launch(1, 32, [src, dst, 32], Memory())


def test_an_access_that_straddles_an_end_faults():
    src, odd = apart(numpy.zeros(8, F32)), apart(numpy.zeros(3, F32))
    with pytest.raises(MemoryFault) as caught:
        copy_kernel(8).launch(1, 32, [src, odd, 2], memory_of(src=src, odd=odd))
    assert caught.value.thread == (1, 0, 0)


def test_misaligned_accesses_fault():
    src, dst = apart(numpy.zeros(400, F32), offset=1), apart(numpy.zeros(400, F32))
    with pytest.raises(MemoryFault) as caught:
        copy_kernel(16).launch(1, 32, [src, dst, 32], memory_of(src=src, dst=dst))
    assert (caught.value.reason, caught.value.width) == ("misaligned load", 16) and "'src'" in caught.value.nearest


def test_stores_to_read_only_buffers_fault():
    src, dst = numpy.zeros(64, F32), numpy.ones(64, F32)
    memory = memory_of(src=src)
    memory.register(dst, "dst", writable=False)
    with pytest.raises(MemoryFault, match="read-only"):
        copy_kernel().launch(1, 64, [src, dst, 64], memory)
    assert (dst == 1).all()


@pytest.mark.parametrize("width", COPIES)
def test_loads_of_poison_fault(width):
    """All bits of an element are set; where it is not loaded, as by threads beyond the end, it is no fault."""
    src, dst = apart(numpy.zeros(64 * width // 4, F32)), apart(numpy.zeros(64 * width // 4, F32))
    memory = Memory(poison=True)
    memory.register(src, "src")
    memory.register(dst, "dst")
    src.view(U32)[40 * width // 4 :] = 0xFFFFFFFF
    copy_kernel(width).launch(1, 64, [src, dst, 40], memory)
    with pytest.raises(MemoryFault, match="poison load") as caught:
        copy_kernel(width).launch(1, 64, [src, dst, 41], memory)
    assert caught.value.thread == (40, 0, 0) and caught.value.address == src.ctypes.data + 40 * width


def test_what_can_be_registered():
    array = numpy.zeros(16, F32)
    memory = memory_of(a=array, empty=numpy.zeros(0, F32))
    for bad, name in ((array[4:8], "b"), (numpy.zeros(4, F32), "a"), (numpy.zeros((4, 4), F32)[:, 1], "c")):
        with pytest.raises(ValueError):
            memory.register(bad, name)
    whole = numpy.zeros(64, F32)
    for i in range(0, 64, 8):
        memory.register(whole[i : i + 8], f"part{i}")  # neighbours may touch
    for bad in (whole, whole[3:5], whole[7:9], whole[63:], whole[:1]):
        with pytest.raises(ValueError, match="overlaps"):
            memory.register(bad, "bad")
    memory.unregister("part8")
    memory.register(whole[8:12], "again")
    with pytest.raises(ValueError, match="overlaps"):
        memory.register(whole[11:16], "bad")
    with pytest.raises(TypeError):
        memory.register([1, 2], "d")


def test_what_can_be_launched():
    array = numpy.zeros(4, F32)
    kernel, memory = copy_kernel(), memory_of(a=array)
    for block, arguments in ((32, [array, array]), (2048, [array, array, 1]), (32, [array, array, 1 << 40])):
        with pytest.raises(ValueError):
            kernel.launch(1, block, arguments, memory)
