/* A stand-in for libcufile in tests: its functions with the types of cufile.h 1.20, reading into host memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct { int err, cu_err; } CUfileError_t;
typedef struct {
	struct {
		unsigned int major_version, minor_version;
		size_t poll_thresh_size, max_direct_io_size;
		unsigned int dstatusflags, dcontrolflags;
	} nvfs;
	unsigned int fflags, max_device_cache_size, per_buffer_cache_size, max_device_pinned_mem_size;
	unsigned int max_batch_io_size, max_batch_io_timeout_msecs;
} CUfileDrvProps_t;
typedef struct {
	int type;
	union { int fd; void *handle; } handle;
	const void *fs_ops;
} CUfileDescr_t;
typedef void *CUfileHandle_t;

typedef struct {
	char uuid[16];
	unsigned long long other[4], total, p2p, nvfs, posix, rest[21];
} CUfilePerGpuStats_t;
typedef struct {
	char basic[624], histograms[512];
	unsigned int num_gpus;
	CUfilePerGpuStats_t per_gpu_stats[16];
} CUfileStatsLevel3_t;

_Static_assert(sizeof(CUfileStatsLevel3_t) == 5112, "as in the header");

static bool compat = true, opened, counting;
static int level;
static unsigned long long counted;
static const CUfileError_t ok = {0, 0};

static CUfileError_t error(int code, int cuda)
{
	CUfileError_t status = {code, cuda};
	return status;
}

CUfileError_t cuFileGetVersion(int *version)
{
	*version = 1200;
	return ok;
}

CUfileError_t cuFileSetParameterBool(int param, bool value)
{
	if (opened)
		return error(5026, 0);
	if (param == 1)
		compat = value;
	return param > 12 ? error(5022, 0) : ok;
}

CUfileError_t cuFileGetParameterBool(int param, bool *value)
{
	*value = compat;
	return param == 1 ? ok : error(5022, 0);
}

CUfileError_t cuFileSetParameterString(int param, const char *text)
{
	return param == 1 && strcmp(text, "/dev/null") == 0 ? ok : error(5022, 0);
}

CUfileError_t cuFileDriverOpen(void)
{
	opened = true;
	return ok;
}

CUfileError_t cuFileDriverClose(void)
{
	opened = false;
	return ok;
}

CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t *p)
{
	memset(p, 0, sizeof *p);
	p->nvfs.major_version = 2;
	p->nvfs.minor_version = 30;
	p->nvfs.max_direct_io_size = 16384;
	p->nvfs.dstatusflags = 1 << 4 | 1 << 11;
	p->nvfs.dcontrolflags = compat ? 2 : 0;
	p->max_device_pinned_mem_size = 1 << 20;
	return ok;
}

CUfileError_t cuFileHandleRegister(CUfileHandle_t *fh, CUfileDescr_t *descr)
{
	int *fd;
	if (descr->type != 1 || descr->fs_ops)
		return error(5022, 0);
	fd = malloc(sizeof *fd);
	*fd = descr->handle.fd;
	*fh = fd;
	return ok;
}

void cuFileHandleDeregister(CUfileHandle_t fh)
{
	free(fh);
}

CUfileError_t cuFileBufRegister(const void *base, size_t length, int flags)
{
	if (flags || !base)
		return error(5022, 0);
	return length > 1 << 30 ? error(5011, 2) : ok;
}

CUfileError_t cuFileBufDeregister(const void *base)
{
	return base ? ok : error(5022, 0);
}

CUfileError_t cuFileSetStatsLevel(int wanted)
{
	level = wanted;
	return ok;
}

CUfileError_t cuFileStatsStart(void)
{
	counting = level == 3;
	return ok;
}

CUfileError_t cuFileStatsStop(void)
{
	counting = false;
	return ok;
}

CUfileError_t cuFileGetStatsL3(CUfileStatsLevel3_t *stats)
{
	memset(stats, 0, sizeof *stats);
	stats->num_gpus = 2;
	stats->per_gpu_stats[1].total = counted;
	stats->per_gpu_stats[1].p2p = 10 * counted;
	stats->per_gpu_stats[1].nvfs = 20 * counted;
	stats->per_gpu_stats[1].posix = 30 * counted;
	/* Behind the last GPU: not to be looked at. */
	stats->per_gpu_stats[2].total = 99;
	return ok;
}

/* Offsets of 1<<32 and more ask for the error of that number. */
ssize_t cuFileRead(CUfileHandle_t fh, void *base, size_t size, off_t file_offset, off_t offset)
{
	if (file_offset >> 32 == 1) {
		errno = EIO;
		return -1;
	}
	if (file_offset >> 32)
		return -(file_offset >> 32);
	counted += counting;
	return pread(*(int *)fh, (char *)base + offset, size, file_offset);
}

ssize_t cuFileWrite(CUfileHandle_t fh, const void *base, size_t size, off_t file_offset, off_t offset)
{
	return pwrite(*(int *)fh, (const char *)base + offset, size, file_offset);
}
