-- NVIDIA DGX H200: H100's chip with more and faster memory, in the same node.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "h200",
  summary = "DGX H200: 8 H200 SXM of 141 GB per node, NVLink 4, 8 x 400 Gb/s InfiniBand",
  nodes   = 1,
  devices = 8,

  device = {
    name          = "H200 SXM 141 GB",
    memory        = "141 GB",
    mem_bandwidth = "4.8 TB/s",
    peak = {
      fp32 = "66.9 TFLOP/s", tf32 = "494.7 TFLOP/s", bf16 = "989.4 TFLOP/s", fp16 = "989.4 TFLOP/s",
      fp8 = "1978.9 TFLOP/s", int8 = "1978.9 TFLOP/s",
    },
    source        = "NVIDIA H200 datasheet, column SXM, as quoted in public: 141 GB (also: MLPerf Inference v4.1 "
                 .. "system file), 4.8 TB/s, rates of H100 SXM (dense: half of those)",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 132, mma_efficiency = 0.86, port_bandwidth = "106 GB/s", store_bandwidth = "16.5 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "fitted to FP8 DeepGEMM on H800, the same chip; its share of memory bandwidth is taken over to HBM3e",
  },

  nvlink = {
    bandwidth  = "450 GB/s",
    efficiency = 0.80,
    latency    = "1 us",
    source  = "NVIDIA H200 datasheet: NVLink 4, 18 links, 900 GB/s both ways together",
    assumed = "efficiency as on H800, where DeepEP takes about 160 of 200 GB/s; latency: order of magnitude",
  },

  pcie = {
    bandwidth  = "63 GB/s",
    efficiency = 0.85,
    latency    = "2 us",
    source  = "PCIe 5.0 x16: 32 GT/s x 16 x 128/130; MLPerf Inference v4.1 system files of NVIDIA: 504 GB/s for 8 "
           .. "GPUs; a switch with one GPU and one NIC has an x16 of its own (Azure/azhpc-images, "
           .. "topology/ndv5-topo.xml, 8 x H100 SXM): nothing is shared",
    assumed = "efficiency: headers of 256-byte packets and flow control; latency: order of magnitude",
  },

  host = {
    memory         = "2 TB",
    mem_bandwidth  = "563.2 GB/s",
    mem_efficiency = 0.80,
    flops          = "14.3 TFLOP/s",
    source  = "MLPerf Inference v4.1 system file of NVIDIA's 8 x H200: 2 x Xeon 8480C, 32 x 64 GB; two modules on "
           .. "each of 16 channels, DDR5-4400 then (Dell, memory bandwidth of PowerEdge servers with Sapphire Rapids)",
    assumed = "efficiency: STREAM Triad takes 650 to 780 of 922 GB/s on Azure's 2 x EPYC with DDR5 (HBv4); flops: "
           .. "112 cores x 2.0 GHz base x 64 FP32 operations per cycle (two AVX-512 FMA units), AMX not counted",
  },

  ssd = {
    bandwidth = "48 GB/s",
    latency   = "100 us",
    source  = "DGX H100/H200 user guide: 8 x 3.84 TB NVMe U.2, PCIe 4.0 x4 each",
    assumed = "6 GB/s of sequential reading per drive; latency: order of magnitude",
  },

  nic = {
    bandwidth = "50 GB/s",
    latency   = "2 us",
    source  = "DGX H100/H200 user guide: one ConnectX-7 port of 400 Gb/s per GPU",
    assumed = "line rate; switches do not block; latency: order of magnitude of GPUDirect RDMA over two switch levels",
  },

  exchange = {
    startup          = "32 us",
    per_peer         = "50 ns",
    message_overhead = "42 B",
    source  = "overhead: InfiniBand Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "startup and per_peer: as on h800-ib, where they are fitted to DeepEP's low-latency kernels",
  },
}
