/* A clock that is ahead, for `make test-elsewhen`: LD_PRELOAD this, ELSEWHEN_SECONDS=n. For glibc 2.33 and newer.

   What asks for the day, and what looks at the age of a file or sets it, is n seconds ahead; so files that are written
   now are new. Durations keep their clock. Not libfaketime: up to 0.9.10 its clock_nanosleep answers EINVAL to every
   time.sleep of Python 3.11, and files that are written now look as old as the clock is ahead.

   Programs that do not ask glibc, such as those in Go, keep the real clock. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <utime.h>

static time_t ahead;

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("ELSEWHEN_SECONDS");
    ahead = text ? atol(text) : 0;
}

/* The next library's function. Of several versions the newest: plain dlsym may take one for programs of 2002. */
static void *next(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}
#define NEXT(name)                                                                                                     \
    static __typeof__(name) *real;                                                                                     \
    if (!real) real = (__typeof__(name) *)next(#name)

/* Clocks */

static int tells_the_day(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int result = real(clock, now);
    if (!result && tells_the_day(clock)) now->tv_sec += ahead;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    NEXT(gettimeofday);
    int result = real(now, zone);
    if (!result) now->tv_sec += ahead;
    return result;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, now) ? base : 0;
}

/* Waits until a moment. Whether it is one of the day or of the uptime is not always said, but plain: far from each
   other. Those that the C++ library makes by the system call itself are not seen here: they would only end too late. */

static struct timespec moment(const struct timespec *until) {
    struct timespec now, found = *until;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found.tv_sec > now.tv_sec - ahead / 2) found.tv_sec -= ahead;
    return found;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted, struct timespec *left) {
    NEXT(clock_nanosleep);
    struct timespec until = flags & TIMER_ABSTIME && tells_the_day(clock) ? moment(wanted) : *wanted;
    return real(clock, flags, &until, left);
}

#define WAIT(name, declared, ...)                                                                                      \
    int name declared {                                                                                                \
        NEXT(name);                                                                                                    \
        struct timespec until = moment(wanted);                                                                        \
        return real(__VA_ARGS__, &until);                                                                              \
    }
WAIT(pthread_cond_timedwait, (pthread_cond_t *restrict c, pthread_mutex_t *restrict m,
                              const struct timespec *restrict wanted), c, m)
WAIT(pthread_cond_clockwait, (pthread_cond_t *restrict c, pthread_mutex_t *restrict m, clockid_t clock,
                              const struct timespec *restrict wanted), c, m, clock)
WAIT(pthread_mutex_timedlock, (pthread_mutex_t *restrict m, const struct timespec *restrict wanted), m)
WAIT(pthread_mutex_clocklock, (pthread_mutex_t *restrict m, clockid_t clock, const struct timespec *restrict wanted),
     m, clock)
WAIT(sem_timedwait, (sem_t *restrict s, const struct timespec *restrict wanted), s)
WAIT(sem_clockwait, (sem_t *restrict s, clockid_t clock, const struct timespec *restrict wanted), s, clock)

/* Ages of files. Names with 64 are what programs built for large files call. */

#define LATER(found) ((found)->st_atim.tv_sec += ahead, (found)->st_mtim.tv_sec += ahead, (found)->st_ctim.tv_sec += ahead)
#define STAT(name, declared, ...)                                                                                      \
    int name declared {                                                                                                \
        NEXT(name);                                                                                                    \
        int result = real(__VA_ARGS__, found);                                                                         \
        if (!result) LATER(found);                                                                                     \
        return result;                                                                                                 \
    }
STAT(stat, (const char *restrict path, struct stat *restrict found), path)
STAT(lstat, (const char *restrict path, struct stat *restrict found), path)
STAT(fstat, (int file, struct stat *found), file)
STAT(stat64, (const char *restrict path, struct stat64 *restrict found), path)
STAT(lstat64, (const char *restrict path, struct stat64 *restrict found), path)
STAT(fstat64, (int file, struct stat64 *found), file)

int fstatat(int folder, const char *restrict path, struct stat *restrict found, int flags) {
    NEXT(fstatat);
    int result = real(folder, path, found, flags);
    if (!result) LATER(found);
    return result;
}

int fstatat64(int folder, const char *restrict path, struct stat64 *restrict found, int flags) {
    NEXT(fstatat64);
    int result = real(folder, path, found, flags);
    if (!result) LATER(found);
    return result;
}

int statx(int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict found) {
    NEXT(statx);
    int result = real(folder, path, flags, mask, found);
    if (!result) {
        found->stx_atime.tv_sec += ahead, found->stx_btime.tv_sec += ahead;
        found->stx_ctime.tv_sec += ahead, found->stx_mtime.tv_sec += ahead;
    }
    return result;
}

/* All ways to set them lead to utimensat or futimens. */

static const struct timespec *earlier(const struct timespec *wanted, struct timespec *times) {
    if (!wanted) return NULL;
    for (int i = 0; i < 2; i++) {
        times[i] = wanted[i];
        if (wanted[i].tv_nsec != UTIME_NOW && wanted[i].tv_nsec != UTIME_OMIT) times[i].tv_sec -= ahead;
    }
    return times;
}

int utimensat(int folder, const char *path, const struct timespec wanted[2], int flags) {
    NEXT(utimensat);
    struct timespec times[2];
    return real(folder, path, earlier(wanted, times), flags);
}

int futimens(int file, const struct timespec wanted[2]) {
    NEXT(futimens);
    struct timespec times[2];
    return real(file, earlier(wanted, times));
}

static const struct timespec *fine(const struct timeval *wanted, struct timespec *times) {
    if (!wanted) return NULL;
    for (int i = 0; i < 2; i++) times[i] = (struct timespec){wanted[i].tv_sec, 1000 * wanted[i].tv_usec};
    return times;
}

int utimes(const char *path, const struct timeval wanted[2]) {
    struct timespec times[2];
    return utimensat(AT_FDCWD, path, fine(wanted, times), 0);
}

int lutimes(const char *path, const struct timeval wanted[2]) {
    struct timespec times[2];
    return utimensat(AT_FDCWD, path, fine(wanted, times), AT_SYMLINK_NOFOLLOW);
}

int futimes(int file, const struct timeval wanted[2]) {
    struct timespec times[2];
    return futimens(file, fine(wanted, times));
}

int utime(const char *path, const struct utimbuf *wanted) {
    struct timespec times[2] = {{wanted ? wanted->actime : 0, 0}, {wanted ? wanted->modtime : 0, 0}};
    return utimensat(AT_FDCWD, path, wanted ? times : NULL, 0);
}
