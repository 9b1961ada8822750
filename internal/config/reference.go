package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Reference says where a secret is: file:/path or env:NAME. It is not secret itself. The empty Reference is none.
//
// env: is the weaker one: a process's environment can be read by whatever else runs as the same user, and is inherited.
type Reference string

// MaxSecretSize bounds what a reference may lead to, in bytes.
const MaxSecretSize = 64 << 10

// referencePattern is the form of a reference, in the schema too.
const referencePattern = `^(file:.+|env:[A-Za-z_][A-Za-z0-9_]*)$`

// Resolve reads the secret that ref leads to, without one trailing newline. The caller owns the bytes.
//
// It fails on a file that group or others may read, one that is no regular file or larger than MaxSecretSize, and on an
// empty secret. No error holds a byte of the secret. Resolve keeps nothing: a file that was replaced is read anew.
func Resolve(ctx context.Context, ref Reference) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	form, rest, _ := strings.Cut(string(ref), ":")
	var secret []byte
	switch {
	case form == "env" && rest != "":
		v, ok := os.LookupEnv(rest)
		if !ok {
			return nil, fmt.Errorf("resolve env:%s: the variable is not set", rest)
		}
		if len(v) > MaxSecretSize {
			return nil, fmt.Errorf("resolve env:%s: more than %d bytes", rest, MaxSecretSize)
		}
		secret = []byte(v)
	case form == "file" && rest != "":
		var err error
		if secret, err = readSecret(rest); err != nil {
			return nil, fmt.Errorf("resolve file:%s: %w", rest, err)
		}
	default: // perhaps the secret itself: it must not be shown
		return nil, errors.New("resolve reference: want file:/path or env:NAME")
	}
	if line, ok := bytes.CutSuffix(secret, []byte("\n")); ok {
		secret = bytes.TrimSuffix(line, []byte("\r"))
	}
	if len(secret) == 0 {
		return nil, fmt.Errorf("resolve %s: it is empty", ref)
	}
	return secret, nil
}

func readSecret(name string) ([]byte, error) {
	before, err := os.Stat(name) // before open, which would wait on a named pipe
	if err != nil {
		return nil, reason(err)
	}
	if !before.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, reason(err)
	}
	defer f.Close()
	info, err := f.Stat() // the opened file's own: the name may lead elsewhere by now
	switch {
	case err != nil:
		return nil, reason(err)
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("group or others may access it (mode %04o); fix: chmod 600 %s", info.Mode().Perm(), name)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxSecretSize+1))
	if err != nil {
		return nil, reason(err)
	}
	if len(b) > MaxSecretSize {
		return nil, fmt.Errorf("more than %d bytes", MaxSecretSize)
	}
	return b, nil
}

// reason is err without the path, which the caller shows already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// within makes a file reference absolute, from dir.
func (ref Reference) within(dir string) Reference {
	if name, ok := strings.CutPrefix(string(ref), "file:"); ok {
		return Reference("file:" + absolute(dir, name))
	}
	return ref
}

// absolute is name from dir, unless it is absolute already.
func absolute(dir, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}
