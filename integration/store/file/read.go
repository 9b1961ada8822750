package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

const (
	suffix = ".age"
	schema = 1
	// maxMaterial bounds the bytes of one secret; maxFile bounds what is read: three of them, base64, in JSON.
	maxMaterial = 8 << 20
	maxFile     = 40 << 20
)

// ReadConfig says where a consumer reads. Only Dir is required.
type ReadConfig struct {
	Dir          string
	IdentityFile string // the age key; empty means Dir with ".key" appended
}

// Reader reads secrets and changes nothing. It may be used by several goroutines while Stores write; every read sees
// one whole version.
type Reader struct {
	dir        string // absolute
	keyPath    string
	opened     fs.FileInfo // the directory as first seen
	identities []age.Identity
}

// Open makes a Reader. It fails with class Refused where the directory is missing, or the key is missing or others may read it.
func Open(cfg ReadConfig) (*Reader, error) {
	if cfg.Dir == "" {
		return nil, rotators.Faultf(rotators.Refused, "open file store", "dir: missing")
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, classify(rotators.Refused, "open file store", err)
	}
	keyPath, err := identityPath(dir, cfg.IdentityFile)
	if err != nil {
		return nil, err
	}
	return openReader(dir, keyPath)
}

func openReader(dir, keyPath string) (*Reader, error) {
	ids, err := readIdentities(keyPath)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = errors.New("it is not a directory")
	}
	if err != nil {
		return nil, classify(rotators.Refused, "open file store "+dir, err)
	}
	return &Reader{dir: dir, keyPath: keyPath, opened: info, identities: ids}, nil
}

// Get reads one stage; the error is Refused around [store.ErrNotFound] if it is empty.
func (r *Reader) Get(ctx context.Context, credential string, stage store.Stage) (store.Secret, error) {
	step := fmt.Sprintf("read %s of %s", stage, credential)
	if err := ctx.Err(); err != nil {
		return store.Secret{}, &rotators.Fault{Class: rotators.Transient, Step: step, Err: err}
	}
	if err := store.CheckCredential(credential); err != nil {
		return store.Secret{}, &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	slots, err := r.load(step, credential)
	if err != nil {
		return store.Secret{}, err
	}
	return slots.At(credential, stage)
}

// path is injective and stays in dir: the two segments of an id hold neither dots nor slashes.
func (r *Reader) path(credential string) string {
	return filepath.Join(r.dir, strings.Replace(credential, "/", ".", 1)+suffix)
}

// credentialOf is the inverse of path for a base name.
func credentialOf(base string) (string, bool) {
	stem, ok := strings.CutSuffix(base, suffix)
	id := strings.Replace(stem, ".", "/", 1)
	return id, ok && store.CheckCredential(id) == nil
}

// present fails if the directory is not the one that was opened, so that an unmounted volume is not taken for an empty store. It
// may come back: that is Transient.
func (r *Reader) present(step string) error {
	info, err := os.Stat(r.dir)
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	if !os.SameFile(info, r.opened) {
		return rotators.Faultf(rotators.Transient, step, "the directory %s was replaced or unmounted since it was opened: put it back, or restart", r.dir)
	}
	return nil
}

// load reads the credential's document; no file is an empty one.
func (r *Reader) load(step, credential string) (store.Slots, error) {
	path := r.path(credential)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return store.Slots{}, r.present(step)
	}
	if err != nil {
		return store.Slots{}, classify(rotators.Transient, step, err)
	}
	defer f.Close()
	sealed, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return store.Slots{}, classify(rotators.Transient, step, err)
	}
	slots, err := r.open(credential, sealed)
	if err != nil {
		return store.Slots{}, rotators.Faultf(rotators.Refused, step, "%s %w", path, err)
	}
	return slots, nil
}

var (
	errDamaged  = errors.New("is damaged: restore it from a backup, or move it away and rotate the credential")
	errWrongKey = errors.New("was not encrypted to the key in")
)

// open decrypts and parses. No error holds anything of the content.
func (r *Reader) open(credential string, sealed []byte) (store.Slots, error) {
	if len(sealed) > maxFile {
		return store.Slots{}, fmt.Errorf("is larger than %d MiB: %w", maxFile>>20, errDamaged)
	}
	plain, err := age.Decrypt(bytes.NewReader(sealed), r.identities...)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return store.Slots{}, fmt.Errorf("%w %s: use the key that it was written with, or restore that one from a backup", errWrongKey, r.keyPath)
	}
	if err != nil {
		return store.Slots{}, errDamaged
	}
	buf := make([]byte, 0, len(sealed)+bytes.MinRead) // never grown, so that no copy is left behind
	defer func() { clear(buf[:cap(buf)]) }()
	w := bytes.NewBuffer(buf)
	if _, err := w.ReadFrom(plain); err != nil {
		return store.Slots{}, errDamaged
	}
	var d document
	defer d.wipe()
	if err := json.Unmarshal(w.Bytes(), &d); err != nil {
		return store.Slots{}, errDamaged
	}
	if d.Schema > schema {
		return store.Slots{}, fmt.Errorf("has schema %d, this build knows %d: it was written by a newer rekey", d.Schema, schema)
	}
	if d.Credential != credential {
		return store.Slots{}, fmt.Errorf("holds another credential's secret (%q): somebody copied or renamed it", d.Credential)
	}
	for _, e := range []*entry{d.Current, d.Pending, d.Previous} {
		if e != nil && (e.Key.Credential != credential || e.Key.Validate() != nil) {
			return store.Slots{}, errDamaged
		}
	}
	return store.Slots{Current: d.Current.secret(), Pending: d.Pending.secret(), Previous: d.Previous.secret()}, nil
}

// document is the plaintext of a file.
type document struct {
	Schema     int    `json:"schema"`
	Credential string `json:"credential"`
	Current    *entry `json:"current,omitempty"`
	Pending    *entry `json:"pending,omitempty"`
	Previous   *entry `json:"previous,omitempty"`
}

type entry struct {
	Key    store.Key         `json:"key"`
	Fields map[string][]byte `json:"fields"` // base64
}

func newEntry(s *store.Secret) *entry {
	if s == nil {
		return nil
	}
	return &entry{Key: s.Key, Fields: s.Material.RevealAll()}
}

func (e *entry) secret() *store.Secret {
	if e == nil {
		return nil
	}
	return &store.Secret{Key: e.Key, Material: rotators.NewMaterial(e.Fields)}
}

// wipe overwrites the fields' bytes. It is best effort: encoding/json keeps buffers of its own.
func (d *document) wipe() {
	for _, e := range []*entry{d.Current, d.Pending, d.Previous} {
		if e != nil {
			for _, v := range e.Fields {
				clear(v)
			}
		}
	}
}

// seal is the inverse of open.
func seal(credential string, s store.Slots, to []age.Recipient) ([]byte, error) {
	d := document{
		Schema: schema, Credential: credential,
		Current: newEntry(s.Current), Pending: newEntry(s.Pending), Previous: newEntry(s.Previous),
	}
	defer d.wipe()
	plain, err := json.Marshal(d)
	if err != nil {
		return nil, errors.New("the secret cannot be written as JSON")
	}
	defer clear(plain)
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to...)
	if err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	if _, err := w.Write(plain); err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	return out.Bytes(), nil
}

// checkFields refuses what JSON would not give back as it was, and what is too large to be a secret.
func checkFields(m rotators.Material) error {
	size := 0
	for _, name := range m.Names() {
		if name == "" || len(name) > 255 || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
			return errors.New("a field's name is not 1 to 255 bytes of printable UTF-8")
		}
		v := m.Reveal(name)
		size += len(name) + len(v)
		clear(v)
	}
	if size > maxMaterial {
		return fmt.Errorf("the secret is larger than %d MiB", maxMaterial>>20)
	}
	return nil
}
