-- The node on which DeepSeek-V3 was trained and DeepEP measured: 8 x H800, one 400 Gb/s InfiniBand NIC per GPU.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "h800-ib",
  summary = "8 H800 SXM per node, NVLink cut to 400 GB/s, 8 x 400 Gb/s InfiniBand (DeepSeek, DeepEP)",
  nodes   = 1,
  devices = 8,

  device = {
    name          = "H800 SXM5 80 GB",
    memory        = "80 GB",
    mem_bandwidth = "3.35 TB/s",
    peak = {
      fp32 = "66.9 TFLOP/s", tf32 = "494.7 TFLOP/s", bf16 = "989.4 TFLOP/s", fp16 = "989.4 TFLOP/s",
      fp8 = "1978.9 TFLOP/s", int8 = "1978.9 TFLOP/s",
    },
    source        = "NVIDIA H100 datasheet, column SXM5, dense figures: H800 differs in NVLink and FP64 only",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 132, mma_efficiency = 0.86, port_bandwidth = "106 GB/s", store_bandwidth = "16.5 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "fitted to the FP8 rates of DeepGEMM's first public README (a6d97a1) on H800: doc/models.md",
  },

  nvlink = {
    bandwidth  = "200 GB/s",
    efficiency = 0.80,
    latency    = "1 us",
    source  = "DeepSeek, ISCA 2025 (arXiv 2505.09343): 400 GB/s both ways; DeepEP: about 160 each way",
    assumed = "latency: order of magnitude",
  },

  pcie = {
    bandwidth  = "63 GB/s",
    efficiency = 0.85,
    latency    = "2 us",
    source  = "PCIe 5.0 x16: 32 GT/s x 16 x 128/130; a switch with one GPU and one NIC has an x16 of its own "
           .. "(Azure/azhpc-images, topology/ndv5-topo.xml, 8 x H100 SXM): nothing is shared",
    assumed = "DeepSeek's nodes are wired like that; efficiency: headers of 256-byte packets and flow control; "
           .. "latency: order of magnitude",
  },

  host = {
    memory         = "2 TB",
    mem_bandwidth  = "563.2 GB/s",
    mem_efficiency = 0.80,
    flops          = "14.3 TFLOP/s",
    source  = "as dgx-h100: 2 x Xeon 8480C, 32 x 64 GB at DDR5-4400",
    assumed = "the hosts of DeepSeek's nodes are not published: a DGX H100's are taken; efficiency: STREAM Triad "
           .. "takes 650 to 780 of 922 GB/s on Azure's 2 x EPYC with DDR5 (HBv4); flops: 112 cores x 2.0 GHz base x "
           .. "64 FP32 operations per cycle (two AVX-512 FMA units), AMX not counted",
  },

  ssd = {
    bandwidth = "48 GB/s",
    latency   = "100 us",
    source  = "DGX H100 user guide: 8 NVMe drives, PCIe 4.0 x4 each",
    assumed = "as on a DGX H100; 6 GB/s of sequential reading per drive; latency: order of magnitude",
  },

  nic = {
    bandwidth = "50 GB/s",
    latency   = "2 us",
    source  = "DeepEP: one ConnectX-7 of 400 Gb/s per GPU, about 50 GB/s",
    assumed = "line rate; switches do not block; latency: order of magnitude",
  },

  exchange = {
    startup          = "32 us",
    per_peer         = "50 ns",
    message_overhead = "42 B",
    source  = "startup: fitted to DeepEP's low-latency kernels on this node (doc/models.md); overhead: InfiniBand "
           .. "Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "per_peer: the fitted rows do not tell it from 0; chosen knowing that EP 64 and more are not far slower",
  },
}
