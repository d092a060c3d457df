-- A workstation with a 24 GB card of 2020 over PCIe 3.0, as in papers that offload experts.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "rtx3090-pcie3",
  summary = "one RTX 3090 of 24 GB over PCIe 3.0 x16, four channels of DDR4, one NVMe drive",
  nodes   = 1,
  devices = 1,

  device = {
    name          = "GeForce RTX 3090",
    memory        = "24 GB",
    mem_bandwidth = "936 GB/s",
    peak = {
      fp32 = "35.6 TFLOP/s", tf32 = "35.6 TFLOP/s", bf16 = "71 TFLOP/s", fp16 = "71 TFLOP/s", int8 = "284 TFLOP/s",
      int4 = "568 TFLOP/s",
    },
    source        = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A: dense, sums in FP32; there is no FP8",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.75,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 82, mma_efficiency = 0.86, port_bandwidth = "102 GB/s", store_bandwidth = "15.9 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted: GEMMs as on Hopper, bandwidths per SM by clock (1.695 GHz); 0.75 of peak elsewhere",
  },

  pcie = {
    bandwidth  = "15.75 GB/s",
    efficiency = 0.80,
    latency    = "5 us",
    peer       = false,
    source  = "PCIe 3.0 x16: 8 GT/s x 16 x 128/130, as the host has it; the card could do 4.0",
    assumed = "efficiency: about 12.6 GB/s reach a copy from pinned memory; no peer-to-peer between GeForce cards "
           .. "without a bridge; latency: order of magnitude of one copy",
  },

  host = {
    memory        = "128 GB",
    mem_bandwidth = "85.3 GB/s",
    flops         = "2.2 TFLOP/s",
    source  = "Intel Core i9-9900X: 4 channels DDR4-2666, 128 GB at most, 10 cores at 3.5 GHz base",
    assumed = "a host of this class, not a measured one; flops: 10 cores x 3.5 GHz x 64 FP32 operations",
  },

  ssd = {
    bandwidth = "3.5 GB/s",
    latency   = "60 us",
    source  = "Samsung 970 EVO Plus datasheet: 3,500 MB/s of sequential reading",
    assumed = "latency: order of magnitude of one random read",
  },
}
