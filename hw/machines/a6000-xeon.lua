-- A 48 GB workstation card beside ten cores of a Xeon: where HybriMoE shares experts between GPU and CPU.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "a6000-xeon",
  summary = "one RTX A6000 of 48 GB, ten cores of a Xeon Gold 5220R, six channels of DDR4 (HybriMoE)",
  nodes   = 1,
  devices = 1,

  device = {
    name          = "RTX A6000",
    memory        = "48 GB",
    mem_bandwidth = "768 GB/s",
    peak = {
      fp32 = "38.7 TFLOP/s", tf32 = "77.4 TFLOP/s", bf16 = "154.8 TFLOP/s", fp16 = "154.8 TFLOP/s",
      int8 = "309.7 TFLOP/s", int4 = "619.3 TFLOP/s",
    },
    source        = "NVIDIA Ampere GA102 GPU architecture whitepaper 2.0, RTX A6000: dense; there is no FP8",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.75,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 84, mma_efficiency = 0.86, port_bandwidth = "109 GB/s", store_bandwidth = "16.9 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted: GEMMs as on Hopper, bandwidths per SM by clock (1.8 GHz); 0.75 of peak elsewhere",
  },

  pcie = {
    bandwidth  = "15.75 GB/s",
    efficiency = 0.80,
    latency    = "5 us",
    source  = "PCIe 3.0 x16: 8 GT/s x 16 x 128/130: the card does 4.0, a Xeon Gold 5220R 3.0",
    assumed = "efficiency: about 12.6 GB/s reach a copy from pinned memory; latency: order of magnitude of one copy",
  },

  host = {
    memory        = "384 GB",
    mem_bandwidth = "128 GB/s",
    flops         = "704 GFLOP/s",
    source  = "HybriMoE (arXiv 2504.05897): RTX A6000, Xeon Gold 5220R limited to 10 cores; Intel: 2.2 GHz base, 6 "
           .. "channels DDR4-2667",
    assumed = "memory: six modules of 64 GB; flops: 10 cores x 2.2 GHz x 32 FP32 operations (one AVX-512 FMA unit)",
  },

  ssd = {
    bandwidth = "3.5 GB/s",
    latency   = "60 us",
    source  = "Samsung 970 EVO Plus datasheet: 3,500 MB/s of sequential reading",
    assumed = "the paper names no drive: one of this class; latency: order of magnitude of one random read",
  },
}
