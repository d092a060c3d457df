-- Eight H20 of 96 GB on NVSwitch, as in HGX H20 nodes; one 400 Gb/s InfiniBand NIC per GPU.
-- doc/machines.md describes the keys. Every figure with a unit carries it; what ends in _s is seconds.
return {
  name    = "h20",
  summary = "8 H20 of 96 GB per node: NVLink 4 and HBM of Hopper, a seventh of H100's arithmetic; 8 x 400 Gb/s",
  nodes   = 1,
  devices = 8,

  device = {
    name          = "H20 SXM 96 GB",
    memory        = "96 GB",
    mem_bandwidth = "4 TB/s",
    peak = {
      fp32 = "44 TFLOP/s", tf32 = "74 TFLOP/s", bf16 = "148 TFLOP/s", fp16 = "148 TFLOP/s", fp8 = "296 TFLOP/s",
      int8 = "296 TFLOP/s",
    },
    source        = "NVIDIA's sheet for the HGX H20, as printed in the press of November 2023 and later (no public "
                 .. "sheet of NVIDIA's): 96 GB HBM3, 4.0 TB/s, dense figures; 78 SMs: what CUDA reports",

    launch_s         = 2.5e-6,
    flops_efficiency = 0.60,
    mem_efficiency   = 0.86,
    gemm = {
      sms = 78, mma_efficiency = 0.86, port_bandwidth = "106 GB/s", store_bandwidth = "16.5 GB/s",
      mem_efficiency = 0.88, launch_s = 1.2e-6, overlap = 2.4,
    },
    assumed = "nothing fitted: bandwidths per SM and efficiencies of H800, of the same family and clock",
  },

  nvlink = {
    bandwidth  = "450 GB/s",
    efficiency = 0.80,
    latency    = "1 us",
    source  = "the same sheet: NVLink 4, 18 links, 900 GB/s both ways together",
    assumed = "efficiency as on H800, where DeepEP takes about 160 of 200 GB/s; latency: order of magnitude",
  },

  pcie = {
    bandwidth  = "63 GB/s",
    efficiency = 0.85,
    latency    = "2 us",
    source  = "PCIe 5.0 x16: 32 GT/s x 16 x 128/130; a switch with one GPU and one NIC has an x16 of its own "
           .. "(Azure/azhpc-images, topology/ndv5-topo.xml, 8 x H100 SXM): nothing is shared",
    assumed = "nodes of H20 are wired like that; efficiency: headers of 256-byte packets and flow control; latency: "
           .. "order of magnitude",
  },

  host = {
    memory         = "2 TB",
    mem_bandwidth  = "563.2 GB/s",
    mem_efficiency = 0.80,
    flops          = "14.3 TFLOP/s",
    source  = "as dgx-h100: 2 x Xeon 8480C, 32 x 64 GB at DDR5-4400",
    assumed = "hosts of H20 nodes vary: a DGX H100's is taken; efficiency: STREAM Triad takes 650 to 780 of 922 GB/s "
           .. "on Azure's 2 x EPYC with DDR5 (HBv4); flops: 112 cores x 2.0 GHz x 64 FP32 operations",
  },

  ssd = {
    bandwidth = "48 GB/s",
    latency   = "100 us",
    source  = "DGX H100 user guide: 8 x 3.84 TB NVMe U.2, PCIe 4.0 x4 each",
    assumed = "as on a DGX H100; 6 GB/s of sequential reading per drive; latency: order of magnitude",
  },

  nic = {
    bandwidth = "50 GB/s",
    latency   = "2 us",
    source  = "DGX H100 user guide: one ConnectX-7 port of 400 Gb/s per GPU",
    assumed = "as on a DGX H100; line rate; switches do not block; latency: order of magnitude",
  },

  exchange = {
    startup          = "32 us",
    per_peer         = "50 ns",
    message_overhead = "42 B",
    source  = "overhead: InfiniBand Architecture 1.4, headers of a first packet (LRH, BTH, RETH, ICRC, VCRC)",
    assumed = "startup and per_peer: as on h800-ib, where they are fitted to DeepEP's low-latency kernels",
  },
}
