-- The machine of the common work that network simulators are compared on: one switch that does not block, one device
-- per node, 50e9 B/s each way, 500 ns. Its NIC is a definition, not hardware; the devices are H100s.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "star-50GBps",
  summary = "one switch, a 50e9 B/s NIC per device each way, 500 ns: for comparison with other simulators",
  nodes   = 8,
  devices = 1,

  device = {
    name          = "H100 SXM5 80 GB",
    memory        = "80 GB",
    mem_bandwidth = "3.35 TB/s",
    peak = {
      fp32 = "66.9 TFLOP/s", tf32 = "494.7 TFLOP/s", bf16 = "989.4 TFLOP/s", fp16 = "989.4 TFLOP/s",
      fp8 = "1978.9 TFLOP/s", int8 = "1978.9 TFLOP/s",
    },
    source        = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper, column SXM5, dense figures",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 132, mma_efficiency = 0.86, port_bandwidth = "106 GB/s", store_bandwidth = "16.5 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "as in dgx-h100",
  },

  nic = {
    bandwidth = "50 GB/s",
    latency   = "500 ns",
    source  = "by definition of the work: 50e9 B/s each way, 500 ns from device to device",
  },
}
