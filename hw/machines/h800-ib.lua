-- The node on which DeepSeek-V3 was trained and DeepEP measured: 8 x H800, one 400 Gb/s InfiniBand NIC per GPU.
-- Units: bytes, B/s, FLOP/s, seconds. doc/machines.md describes the keys.
return {
  name    = "h800-ib",
  summary = "8 H800 SXM per node, NVLink cut to 400 GB/s, 8 x 400 Gb/s InfiniBand (DeepSeek, DeepEP)",
  nodes   = 1,
  devices = 8,

  device = {
    name          = "H800 SXM5 80 GB",
    memory        = 80e9,
    mem_bandwidth = 3.35e12,
    peak = { fp32 = 66.9e12, tf32 = 494.7e12, bf16 = 989.4e12, fp8 = 1978.9e12, int8 = 1978.9e12 },
    source        = "NVIDIA H100 datasheet, column SXM5, dense figures: H800 differs in NVLink and FP64 only",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 132, mma_efficiency = 0.86, port_bandwidth = 106e9, store_bandwidth = 16.5e9, mem_efficiency = 0.88,
      launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "fitted to the FP8 rates of DeepGEMM's first public README (a6d97a1) on H800: doc/machines.md",
  },

  nvlink = {
    bandwidth  = 200e9,
    efficiency = 0.80,
    latency    = 1e-6,
    source  = "DeepSeek, ISCA 2025 (arXiv 2505.09343): 400 GB/s both ways; DeepEP: about 160 each way",
    assumed = "latency: order of magnitude",
  },

  pcie = {
    bandwidth  = 63.0e9,
    efficiency = 0.85,
    latency    = 2e-6,
    source  = "PCIe 5.0 x16: 32 GT/s x 16 x 128/130",
    assumed = "efficiency: headers of 256-byte packets and flow control; latency: order of magnitude",
  },

  host = {
    memory        = 2e12,
    mem_bandwidth = 614.4e9,
    flops         = 14.3e12,
    source  = "DGX H100 user guide (2 x Xeon 8480C, 16 channels DDR5-4800)",
    assumed = "the hosts of DeepSeek's nodes are not published: a DGX H100's are taken",
  },

  ssd = {
    bandwidth = 48e9,
    latency   = 100e-6,
    source  = "DGX H100 user guide: 8 NVMe drives, PCIe 4.0 x4 each",
    assumed = "as on a DGX H100; 6 GB/s of sequential reading per drive; latency: order of magnitude",
  },

  nic = {
    bandwidth = 50e9,
    latency   = 2e-6,
    source  = "DeepEP: one ConnectX-7 of 400 Gb/s per GPU, about 50 GB/s",
    assumed = "line rate; switches do not block; latency: order of magnitude",
  },

  exchange = {
    startup          = 32e-6,
    per_peer         = 50e-9,
    message_overhead = 42,
    source  = "startup: fitted to DeepEP's low-latency kernels on this node (doc/machines.md); overhead: InfiniBand "
           .. "Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "per_peer: the published rows do not tell it from 0",
  },
}
