-- NVIDIA DGX A100 (640 GB): 8 x A100 80 GB on NVSwitch, one 200 Gb/s InfiniBand NIC per GPU.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "dgx-a100",
  summary = "DGX A100 640 GB: 8 A100 SXM4 80 GB per node, NVLink 3, 8 x 200 Gb/s InfiniBand",
  nodes   = 1,
  devices = 8,

  device = {
    name          = "A100 SXM4 80 GB",
    memory        = "80 GB",
    mem_bandwidth = "2.039 TB/s",
    peak = {
      fp32 = "19.5 TFLOP/s", tf32 = "156 TFLOP/s", bf16 = "312 TFLOP/s", fp16 = "312 TFLOP/s", int8 = "624 TFLOP/s",
      int4 = "1248 TFLOP/s",
    },
    source        = "NVIDIA A100 datasheet, column 80GB SXM, dense figures; there is no FP8",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.75,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 108, mma_efficiency = 0.86, port_bandwidth = "85 GB/s", store_bandwidth = "13.2 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted: GEMMs as on Hopper, bandwidths per SM by clock; 0.75 of peak elsewhere",
  },

  nvlink = {
    bandwidth  = "300 GB/s",
    efficiency = 0.80,
    latency    = "1 us",
    source  = "NVIDIA A100 datasheet: NVLink 3, 12 links, 600 GB/s both ways together",
    assumed = "efficiency as on H800, where DeepEP takes about 160 of 200 GB/s; latency: order of magnitude",
  },

  pcie = {
    bandwidth  = "31.5 GB/s",
    efficiency = 0.80,
    latency    = "2 us",
    per_switch = 2,
    uplink     = "31.5 GB/s",
    source  = "PCIe 4.0 x16: 16 GT/s x 16 x 128/130; two GPUs and two NICs below each of four switches of an 8 x "
           .. "A100 SXM node with 2 x EPYC: Azure/azhpc-images, topology/ndv4-topo.xml",
    assumed = "a DGX A100 is wired like that node, with one x16 from a switch to its CPU; efficiency: about 25 GB/s "
           .. "reach a copy from pinned memory; latency: order of magnitude",
  },

  host = {
    memory         = "2 TB",
    mem_bandwidth  = "409.6 GB/s",
    mem_efficiency = 0.83,
    flops          = "9.2 TFLOP/s",
    source  = "MLPerf Inference v2.0 system file of NVIDIA's DGX A100: 2 x EPYC 7742, 2 TB; AMD: 8 channels "
           .. "DDR4-3200 per socket; efficiency: STREAM Triad on Azure's 2 x EPYC with as many channels (HBv3), 330 "
           .. "to 350 GB/s",
    assumed = "modules run at 3,200 MT/s although two share a channel; flops: 128 cores x 2.25 GHz base x 32 FP32 "
           .. "operations per cycle (two AVX2 FMA units)",
  },

  ssd = {
    bandwidth = "48 GB/s",
    latency   = "100 us",
    source  = "DGX A100 user guide: 8 x 3.84 TB NVMe U.2, PCIe 4.0 x4 each",
    assumed = "6 GB/s of sequential reading per drive; latency: order of magnitude",
  },

  nic = {
    bandwidth = "25 GB/s",
    latency   = "2 us",
    source  = "DGX A100 user guide: 8 ConnectX-6 ports of 200 Gb/s for computing, one per GPU",
    assumed = "line rate; switches do not block; latency: order of magnitude",
  },

  exchange = {
    startup          = "32 us",
    per_peer         = "50 ns",
    message_overhead = "42 B",
    source  = "overhead: InfiniBand Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "startup and per_peer: as on h800-ib, where they are fitted to DeepEP's low-latency kernels",
  },
}
