-- An embedded module of 2017, where EdgeMoE keeps experts on a disk. CPU and GPU share one memory: there is no copy to
-- a device to speak of, and what the host holds the device lacks. No tensor cores and no BF16: run FP16.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "jetson-tx2",
  summary = "Jetson TX2: 256 Pascal cores and 6 ARM cores on one memory of 8 GB, experts on a SATA SSD (EdgeMoE)",
  nodes   = 1,
  devices = 1,

  device = {
    name          = "Tegra X2 (GP10B)",
    memory        = "8 GB",
    mem_bandwidth = "59.7 GB/s",
    peak = { fp32 = "665 GFLOP/s", fp16 = "1.33 TFLOP/s" },
    source        = "NVIDIA Jetson TX2 System-on-Module data sheet 1.1: 256 Pascal cores, 8 GB of LPDDR4; CUDA "
                 .. "reports 2 multiprocessors, 1.3 GHz and 128 bits, which at 3,732 MT/s are 59.7 GB/s (58.4 in "
                 .. "reports of 2017)",

    launch_s         = 10e-6,
    flops_efficiency = 0.75,
    mem_efficiency   = 0.80,
    gemm = {
      sms = 2, mma_efficiency = 0.75, port_bandwidth = "78.5 GB/s", store_bandwidth = "12.2 GB/s",
      mem_efficiency = 0.80, launch_s = 10e-6, overlap = 2.4,
    },
    assumed = "nothing fitted, no published kernel: FP16 at twice FP32; bandwidths per SM by clock from Hopper; "
           .. "efficiencies and launch: orders of magnitude",
  },

  host = {
    unified = true,
    flops   = "96 GFLOP/s",
    source  = "NVIDIA Jetson TX2 series module data sheet: 2 Denver 2 and 4 Cortex-A57 cores at 2 GHz, memory shared",
    assumed = "flops: 6 cores x 2 GHz x 8 FP32 operations (one 128-bit FMA unit)",
  },

  ssd = {
    bandwidth = "550 MB/s",
    latency   = "100 us",
    source  = "EdgeMoE (arXiv 2308.14352): Samsung 860 EVO, 550 MB/s of sequential reading",
    assumed = "latency: order of magnitude of one random read over SATA",
  },
}
