"""CUDA kernels: from the sources of ``kernels_cu`` to functions that can be launched.

::

    variants    which kernels exist: a file and a C++ name expression each
    sources     where the CUDA sources lie, and their bytes
    nvrtc       NVIDIA's run-time compiler, called through ctypes
    cache       compiled kernels on disk (entries); storage: which folders are used
    private     a folder of this process, where no other can be written
    build       variant -> file of machine code, from the cache or compiled
    module      variant -> function on one device, kept in memory
    params      what one call launches, made once for a shape; pooling: for pool.cu
    launch      a plan's launches, queued on the caller's stream
    devices     which GPUs there are, and what they can run; nvml: asked without CUDA
    archive     compiled kernels in one file, for other machines; tarball: read strictly
    background  when to compile (modes): at import, behind it, at first use, never
    lifecycle   what forks and the end of the process do to compilations

Importing these modules loads the standard library only, and touches no GPU. cupy and NVRTC are
loaded when something must be compiled or launched.
"""
