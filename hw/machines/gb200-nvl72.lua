-- NVIDIA GB200 NVL72: 72 GPUs and 36 Grace CPUs of one rack in one NVLink domain, which is one node here.
-- The table `pcie` holds what takes its place: NVLink-C2C between a GPU and its Grace. The 36 memories of the CPUs are
-- one memory of the node, reached by each GPU at the rate of its own C2C.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "gb200-nvl72",
  summary = "GB200 NVL72: 72 B200 in one NVLink 5 domain, 36 Grace CPUs over NVLink-C2C, 72 x 400 Gb/s",
  nodes   = 1,
  devices = 72,

  device = {
    name          = "B200 of a GB200, 186 GB",
    memory        = "186 GB",
    mem_bandwidth = "8 TB/s",
    peak = {
      fp32 = "80 TFLOP/s", tf32 = "1250 TFLOP/s", bf16 = "2500 TFLOP/s", fp16 = "2500 TFLOP/s", fp8 = "5000 TFLOP/s",
      int8 = "5000 TFLOP/s",
    },
    source        = "NVIDIA GB200 NVL72 specifications as quoted in public, a 72nd of the rack (13.4 TB, 576 TB/s, "
                 .. "FP8 720 PFLOP/s with sparsity), dense figures; 186 GB: MLPerf Inference system files",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 152, mma_efficiency = 0.86, port_bandwidth = "232 GB/s", store_bandwidth = "36.2 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted, FP4 left out: 152 SMs as CUDA reports on a GB200, in no sheet of NVIDIA's; "
           .. "efficiencies of Hopper; bandwidths per SM by clock (1.92 GHz), twice, since two SMs that compute one "
           .. "tile fetch and store its halves",
  },

  nvlink = {
    bandwidth  = "900 GB/s",
    efficiency = 0.80,
    latency    = "1 us",
    source  = "NVIDIA GB200 NVL72 datasheet: NVLink 5, 1.8 TB/s per GPU both ways together, 130 TB/s in all",
    assumed = "efficiency as on H800, where DeepEP takes about 160 of 200 GB/s; latency: order of magnitude",
  },

  pcie = {
    name       = "C2C",
    bandwidth  = "225 GB/s",
    efficiency = 0.90,
    latency    = "2 us",
    source  = "NVIDIA GB200 datasheet: NVLink-C2C of a superchip (one Grace, two GPUs) 900 GB/s both ways together",
    assumed = "each of the two GPUs has half of it; efficiency and latency: orders of magnitude",
  },

  host = {
    memory         = "17 TB",
    mem_bandwidth  = "14 TB/s",
    mem_efficiency = 0.85,
    flops          = "249 TFLOP/s",
    source  = "NVIDIA GB200 NVL72 specifications as quoted in public: 17 TB of LPDDR5X of 36 Graces, 14 TB/s "
           .. "together (the preliminary ones of 2024: 18.4 TB/s)",
    assumed = "efficiency: the class of NVIDIA's STREAM references for smaller Graces (410 GB/s or more of 512); "
           .. "flops: 36 x 72 cores x 3.0 GHz x 32 FP32 operations per cycle (four 128-bit SVE2 units)",
  },

  nic = {
    bandwidth = "50 GB/s",
    latency   = "2 us",
    source  = "one ConnectX-7 per GPU: MLPerf Inference v6.1 system file of a GB200 NVL72 (Crusoe), four for four "
           .. "GPUs; 400 Gb/s: NVIDIA's name for that generation, NDR",
    assumed = "line rate; switches do not block; latency: order of magnitude; racks with ConnectX-8 have twice that",
  },

  exchange = {
    startup          = "32 us",
    per_peer         = "50 ns",
    message_overhead = "42 B",
    source  = "overhead: InfiniBand Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "startup and per_peer: as on h800-ib, where they are fitted to DeepEP's low-latency kernels",
  },
}
