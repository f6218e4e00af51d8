/* Preloaded into a process by inject_faults.py: counts what the process does to the files under a folder, by whatever
   library, and at one of these operations kills it or lets the operation fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long chosen;
static int failure; /* 0: SIGKILL */
static atomic_long num_operations;

/* From now on; an operation of number 0 does not come, so that all are only counted. */
void arm_faults(const char *under, long number, int error) {
    chosen = number, failure = error, num_operations = 0;
    strcpy(folder, under);
}

long count_operations(void) { return num_operations; }

static int is_under(int directory, const char *path) {
    char whole[2 * PATH_MAX] = "", link[64];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, whole, PATH_MAX);
        if (length < 0) return 0;
        whole[length] = '/', whole[length + 1] = 0;
    }
    strncat(whole, path, PATH_MAX - 1);
    return !strncmp(whole, folder, strlen(folder));
}

static int is_file_under(int descriptor) {
    char link[64], path[PATH_MAX] = "";
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    return readlink(link, path, PATH_MAX - 1) > 0 && is_under(AT_FDCWD, path);
}

/* Whether this operation fails; one that takes room on the disk fails again and again once the disk is full. */
static int fails(int takes_room) {
    long number = ++num_operations;
    if (!chosen || number < chosen || (number > chosen && failure != ENOSPC)) return 0;
    if (failure == 0) kill(getpid(), SIGKILL), pause();
    if (failure == ENOSPC && !takes_room) return 0;
    errno = failure;
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENS(name, directory, FIRST, first)                                                                    \
    int name(FIRST const char *path, int flags, ...) {                                                          \
        va_list rest;                                                                                           \
        va_start(rest, flags);                                                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                 \
        va_end(rest);                                                                                           \
        REAL(name);                                                                                             \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && is_under(directory, path) && fails(flags & O_CREAT)) return -1; \
        return real(first path, flags, mode);                                                                   \
    }
OPENS(open, AT_FDCWD, , )
OPENS(open64, AT_FDCWD, , )
#define COMMA ,
OPENS(openat, at, int at COMMA, at COMMA)
OPENS(openat64, at, int at COMMA, at COMMA)

#define STREAMS(name)                                                                                   \
    FILE *name(const char *path, const char *mode) {                                                    \
        REAL(name);                                                                                     \
        if (strpbrk(mode, "wa+") && is_under(AT_FDCWD, path) && fails(1)) return NULL;                  \
        return real(path, mode);                                                                        \
    }
STREAMS(fopen)
STREAMS(fopen64)

#define WITH_PATH(name, at, path, takes_room, PARAMETERS, ARGUMENTS) \
    int name PARAMETERS {                                            \
        REAL(name);                                                  \
        if (is_under(at, path) && fails(takes_room)) return -1;      \
        return real ARGUMENTS;                                       \
    }
WITH_PATH(rename, AT_FDCWD, to, 1, (const char *from, const char *to), (from, to))
WITH_PATH(renameat, at, to, 1, (int from_at, const char *from, int at, const char *to), (from_at, from, at, to))
WITH_PATH(unlink, AT_FDCWD, path, 0, (const char *path), (path))
WITH_PATH(unlinkat, at, path, 0, (int at, const char *path, int flags), (at, path, flags))
WITH_PATH(rmdir, AT_FDCWD, path, 0, (const char *path), (path))
WITH_PATH(mkdir, AT_FDCWD, path, 1, (const char *path, mode_t mode), (path, mode))
WITH_PATH(mkdirat, at, path, 1, (int at, const char *path, mode_t mode), (at, path, mode))
WITH_PATH(truncate, AT_FDCWD, path, 0, (const char *path, off_t size), (path, size))
WITH_PATH(truncate64, AT_FDCWD, path, 0, (const char *path, off64_t size), (path, size))

#define WITH_FILE(name, takes_room, PARAMETERS, ARGUMENTS)              \
    int name PARAMETERS {                                               \
        REAL(name);                                                     \
        if (is_file_under(descriptor) && fails(takes_room)) return -1;  \
        return real ARGUMENTS;                                          \
    }
WITH_FILE(fsync, 1, (int descriptor), (descriptor))
WITH_FILE(fdatasync, 1, (int descriptor), (descriptor))
WITH_FILE(ftruncate, 1, (int descriptor, off_t size), (descriptor, size))
WITH_FILE(ftruncate64, 1, (int descriptor, off64_t size), (descriptor, size))

ssize_t write(int descriptor, const void *content, size_t size) {
    REAL(write);
    if (is_file_under(descriptor)) {
        if (chosen && failure == 0 && num_operations + 1 == chosen) real(descriptor, content, size / 2); /* torn */
        if (fails(1)) return -1;
    }
    return real(descriptor, content, size);
}
