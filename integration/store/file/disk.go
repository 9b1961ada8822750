package file

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

const (
	locks     = ".locks" // directory of the lock files, in Dir
	lockCount = 64
	tempMark  = ".tmp-" // in the name of a file that is not in place yet
)

// prepareDir makes the directory, or checks that nobody else can read or write it.
func prepareDir(dir string) (string, error) {
	step := "open file store " + dir
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", classify(rotators.Refused, step, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", classify(rotators.Transient, step, err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", classify(rotators.Transient, step, err)
	}
	if o := owner(info); o != os.Geteuid() {
		return "", rotators.Faultf(rotators.Refused, step, "it belongs to user %d and this process runs as %d: run chown -R %d %s, or run as that user", o, os.Geteuid(), os.Geteuid(), dir)
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return "", rotators.Faultf(rotators.Refused, step, "its mode is %#o, so that others may enter: run chmod 700 %s", m, dir)
	}
	if err := os.MkdirAll(filepath.Join(dir, locks), 0o700); err != nil {
		return "", classify(rotators.Transient, step, err)
	}
	return dir, nil
}

func owner(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

// list is the credentials that have a file.
func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if id, ok := credentialOf(e.Name()); ok && e.Type().IsRegular() {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func lockPath(dir, credential string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(credential))
	return filepath.Join(dir, locks, fmt.Sprintf("%02x", h.Sum32()%lockCount))
}

// errBusy is tryLock's answer while somebody else holds the lock.
var errBusy = errors.New("another writer holds the lock")

// flock waits for an exclusive lock on path, shared between processes and goroutines. The kernel drops it with its
// holder, however that dies.
func flock(ctx context.Context, path string) (release func(), err error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		release, err := tryLock(path)
		if !errors.Is(err, errBusy) {
			return release, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", ctx.Err(), err)
		case <-time.After(wait):
		}
	}
}

func tryLock(path string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, syscall.EINTR) {
			return nil, errBusy
		}
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return func() { _ = f.Close() }, nil
}

// errMaybePlaced: the rename failed, and the file is not where it was before either.
var errMaybePlaced = errors.New("the new file may be in place")

// replaceAtomically makes path hold data, or leaves it as it was. The caller syncs the directory.
func (s *Store) replaceAtomically(path string, data []byte) error {
	temp, err := s.writeTemp(path, data)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		if os.Remove(temp) != nil {
			return fmt.Errorf("%w: %w", errMaybePlaced, err)
		}
		return err
	}
	s.reach("renamed")
	return nil
}

// writeTemp writes and syncs a file beside path, mode 0600, and removes it again if that fails.
func (s *Store) writeTemp(path string, data []byte) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+tempMark+"*")
	if err != nil {
		return "", err
	}
	s.reach("created")
	half := len(data) / 2
	_, err = f.Write(data[:half])
	if err == nil {
		s.reach("half written")
		_, err = f.Write(data[half:])
	}
	if err == nil {
		s.reach("written")
		err = f.Sync()
	}
	if err == nil {
		s.reach("synced")
	}
	if err := errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// removeLeftovers removes the temporary files of writers that died. A writer holds the credential's lock while it has one,
// so that any found under the lock has no owner; those of a busy credential are left to the next start.
func (s *Store) removeLeftovers() error {
	step := "clean file store " + s.reader.dir
	entries, err := os.ReadDir(s.reader.dir)
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	for _, e := range entries {
		base, _, ok := strings.Cut(strings.TrimPrefix(e.Name(), "."), tempMark)
		credential, valid := credentialOf(base)
		if !ok || !valid || !strings.HasPrefix(e.Name(), ".") || !e.Type().IsRegular() {
			continue
		}
		release, err := tryLock(lockPath(s.reader.dir, credential))
		if errors.Is(err, errBusy) {
			continue
		}
		if err == nil {
			err = os.Remove(filepath.Join(s.reader.dir, e.Name()))
			release()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return classify(rotators.Transient, step, err)
		}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// classify makes a fault of what the operating system said. otherwise is the class of errors that say nothing about what to do;
// the certain ones keep Unsure if that is it, as the change may have happened.
func classify(otherwise rotators.Class, step string, err error) *rotators.Fault {
	class, remedy := otherwise, ""
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		class, remedy = rotators.Transient, "free space on the disk"
	case errors.Is(err, syscall.EROFS):
		class, remedy = rotators.Refused, "the file system is read-only: mount it writable"
	case errors.Is(err, fs.ErrPermission):
		class, remedy = rotators.Refused, fmt.Sprintf("give user %d access", os.Geteuid())
	}
	if otherwise == rotators.Unsure || errors.Is(err, errMaybePlaced) {
		class = rotators.Unsure
	}
	if remedy != "" {
		err = fmt.Errorf("%w: %s", err, remedy)
	}
	return &rotators.Fault{Class: class, Step: step, Err: err}
}
