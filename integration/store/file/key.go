package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"

	"github.com/rekeyhq/rekey/rotators"
)

func identityPath(dir, configured string) (string, error) {
	if configured == "" {
		return dir + ".key", nil
	}
	p, err := filepath.Abs(configured)
	if err != nil {
		return "", classify(rotators.Refused, "read key "+configured, err)
	}
	return p, nil
}

// readIdentities refuses a key that others may read, and one that is not a key.
func readIdentities(path string) ([]age.Identity, error) {
	step := "read key " + path
	info, err := os.Stat(path)
	if err != nil {
		return nil, classify(rotators.Refused, step, err)
	}
	if !info.Mode().IsRegular() {
		return nil, rotators.Faultf(rotators.Refused, step, "it is not a regular file")
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return nil, rotators.Faultf(rotators.Refused, step, "its mode is %#o, so that others may use it: run chmod 600 %s", m, path)
	}
	if o := owner(info); o != os.Geteuid() && o != 0 && os.Geteuid() != 0 {
		return nil, rotators.Faultf(rotators.Refused, step, "it belongs to user %d: run chown %d %s", o, os.Geteuid(), path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, classify(rotators.Refused, step, err)
	}
	defer clear(text)
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil { // the text of err may quote the key
		return nil, rotators.Faultf(rotators.Refused, step, "it holds no age key (a line AGE-SECRET-KEY-1…)")
	}
	return ids, nil
}

// ensureIdentity generates the key if it is missing and no secret was ever encrypted to it. Of several processes that do so
// at once, one wins and the others use its key; a crash leaves no key or a whole one.
func (s *Store) ensureIdentity(dir, path string) error {
	step := "generate key " + path
	if info, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		removeKeyTemps(path, info)
		return nil // readIdentities says what is wrong with it
	}
	release, err := s.lock(context.Background(), filepath.Join(dir, locks, "key"))
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	defer release()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	secrets, err := list(dir)
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	if len(secrets) > 0 {
		return rotators.Faultf(rotators.Refused, step, "it is missing, but %s holds %d secrets that only it can open: restore the key from a backup, or set the path where it is", dir, len(secrets))
	}
	removeKeyTemps(path, nil)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return &rotators.Fault{Class: rotators.Transient, Step: step, Err: err}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return classify(rotators.Transient, step, err)
	}
	text := fmt.Appendf(nil, "# The key of the secrets in %s. Keep a backup elsewhere.\n# public key: %s\n%s\n", dir, id.Recipient(), id)
	defer clear(text)
	temp, err := s.writeTemp(path, text)
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	err = os.Link(temp, path) // unlike a rename it never replaces a key
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err := errors.Join(err, os.Remove(temp)); err != nil {
		return classify(rotators.Transient, step, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return classify(rotators.Unsure, step, err)
	}
	return nil
}

// removeKeyTemps removes what a crash left beside the key: second names of it, or, while there is no key, keys never used.
func removeKeyTemps(path string, key fs.FileInfo) {
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "."+filepath.Base(path)+tempMark) {
			continue
		}
		if info, err := e.Info(); err == nil && (key == nil || os.SameFile(info, key)) {
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}

// checkKey opens a few of the secrets, so that a wrong key is found at start and not in the middle of a rotation.
func (r *Reader) checkKey() error {
	secrets, err := list(r.dir)
	if err != nil {
		return classify(rotators.Transient, "open file store "+r.dir, err)
	}
	var wrong error
	for _, credential := range secrets[:min(len(secrets), 8)] {
		switch _, err := r.load("open file store "+r.dir, credential); {
		case err == nil:
			return nil
		case errors.Is(err, errWrongKey):
			wrong = err
		}
	}
	return wrong
}
