-- The machine of the common work that network simulators are compared on: one switch that does not block, one device
-- per node, 50e9 B/s each way, 500 ns. Its NIC is a definition, not hardware; the devices are H100s.
-- Units: bytes, B/s, FLOP/s, seconds. doc/machines.md describes the keys.
return {
  name    = "star-50GBps",
  summary = "one switch, a 50e9 B/s NIC per device each way, 500 ns: for comparison with other simulators",
  nodes   = 8,
  devices = 1,

  device = {
    name          = "H100 SXM5 80 GB",
    memory        = 80e9,
    mem_bandwidth = 3.35e12,
    peak = { fp32 = 66.9e12, tf32 = 494.7e12, bf16 = 989.4e12, fp8 = 1978.9e12, int8 = 1978.9e12 },
    source        = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper, column SXM5, dense figures",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 132, mma_efficiency = 0.86, port_bandwidth = 106e9, store_bandwidth = 16.5e9, mem_efficiency = 0.88,
      launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "as in dgx-h100",
  },

  nic = {
    bandwidth = 50e9,
    latency   = 500e-9,
    source  = "by definition of the work: 50e9 B/s each way, 500 ns from device to device",
  },
}
