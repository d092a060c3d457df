-- A workstation with a 24 GB card: where experts are offloaded to host memory and fetched over PCIe.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "rtx4090-pcie4",
  summary = "one RTX 4090 of 24 GB over PCIe 4.0 x16, two channels of DDR5, one NVMe drive",
  nodes   = 1,
  devices = 1,

  device = {
    name          = "GeForce RTX 4090",
    memory        = "24 GB",
    mem_bandwidth = "1.008 TB/s",
    peak = {
      fp32 = "82.6 TFLOP/s", tf32 = "82.6 TFLOP/s", bf16 = "165.2 TFLOP/s", fp16 = "165.2 TFLOP/s",
      fp8 = "330.3 TFLOP/s", int8 = "660.6 TFLOP/s", int4 = "1321.2 TFLOP/s",
    },
    source        = "NVIDIA Ada GPU architecture whitepaper, appendix A: dense, sums in FP32",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.75,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 128, mma_efficiency = 0.86, port_bandwidth = "152 GB/s", store_bandwidth = "23.7 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted: GEMMs as on Hopper, bandwidths per SM by clock; 0.75 of peak elsewhere",
  },

  pcie = {
    bandwidth  = "31.5 GB/s",
    efficiency = 0.80,
    latency    = "5 us",
    peer       = false,
    source  = "PCIe 4.0 x16: 16 GT/s x 16 x 128/130; no peer-to-peer between GeForce 40 cards in NVIDIA's driver",
    assumed = "efficiency: about 25 GB/s reach a copy from pinned memory; latency: order of magnitude of one copy",
  },

  host = {
    memory        = "128 GB",
    mem_bandwidth = "83.2 GB/s",
    flops         = "2.3 TFLOP/s",
    source  = "AMD Ryzen 9 7950X: 2 channels DDR5-5200, 128 GB, 16 cores at 4.5 GHz base",
    assumed = "a host of this class, not a measured one; flops: 16 cores x 4.5 GHz x 32 FP32 operations",
  },

  ssd = {
    bandwidth = "7.45 GB/s",
    latency   = "60 us",
    source  = "Samsung 990 PRO datasheet: 7,450 MB/s of sequential reading",
    assumed = "latency: order of magnitude of one random read",
  },
}
