package api

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Identity is somebody who may use the API: a name for audit entries, and what it may do.
type Identity struct {
	Name   string  `json:"name"`
	Scopes []Scope `json:"scopes"`
	// Teams limits the identity to these teams' credentials; empty for all.
	Teams []string `json:"teams,omitempty"`
	// TokenSHA256 is hex. The token itself is 256 random bits and is kept nowhere.
	TokenSHA256 string    `json:"token_sha256"`
	CreatedAt   time.Time `json:"created_at"`
	CreatedBy   string    `json:"created_by,omitempty"`
}

// The files of the data directory.
const (
	IdentitiesFile = "identities.json"
	AdminTokenFile = "admin.token"
)

// What changing the identities may answer.
var (
	ErrIdentityExists = errors.New("there is an identity of that name")
	ErrTokenTaken     = errors.New("another identity has this token: draw a new one")
	ErrNoIdentity     = errors.New("there is no identity of that name")
	ErrLastAdmin      = errors.New("it is the last identity with the scope admin: without it nobody could add another") // invariant 12
)

// Identities are kept in one file, readable by its owner only. Only one process may use a directory at a time.
type Identities struct {
	path string
	mu   sync.RWMutex
	list []Identity
}

type identityFile struct {
	Version    int        `json:"version"`
	Identities []Identity `json:"identities"`
}

// OpenIdentities reads the identities in dataDir. Where there are none yet it makes `admin`, with every scope, and writes its
// token to admin.token, readable by the owner only. The token is durable before the identity: a crash in between leaves a
// token that the next call replaces. Removing identities.json is thus how a lost admin token is recovered.
func OpenIdentities(dataDir string, now time.Time) (*Identities, error) {
	i := &Identities{path: filepath.Join(dataDir, IdentitiesFile)}
	err := i.load()
	if errors.Is(err, os.ErrNotExist) {
		err = i.bootstrap(filepath.Join(dataDir, AdminTokenFile), now)
	}
	if err != nil {
		return nil, fmt.Errorf("open identities: %w", err)
	}
	return i, nil
}

func (i *Identities) load() error {
	f, err := os.Open(i.path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s: group or others may access it (mode %04o); fix: chmod 600 %s", i.path, info.Mode().Perm(), i.path)
	}
	b, err := io.ReadAll(io.LimitReader(f, 16<<20))
	if err != nil {
		return err
	}
	var file identityFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return fmt.Errorf("%s is damaged: %w; restore it, or remove it to begin anew with an admin token", i.path, err)
	}
	if file.Version != 1 {
		return fmt.Errorf("%s has version %d, this build knows 1", i.path, file.Version)
	}
	for _, id := range file.Identities {
		if bad := id.problems(); len(bad) > 0 {
			return fmt.Errorf("%s: identity %s: %s", i.path, clip(id.Name), strings.Join(bad, "; "))
		}
	}
	i.list = file.Identities
	return nil
}

func (i *Identities) bootstrap(tokenFile string, now time.Time) error {
	token, hash := NewToken()
	if err := writeOwned(tokenFile, []byte(token+"\n")); err != nil {
		return err
	}
	return i.replace([]Identity{{Name: "admin", Scopes: Scopes(), TokenSHA256: hash, CreatedAt: now.UTC()}})
}

// NewToken draws a token of 256 random bits and its hash, as Identity.TokenSHA256 wants it.
func NewToken() (token, hash string) {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // it never fails: it ends the program instead
	token = "rekey_" + base64.RawURLEncoding.EncodeToString(b)
	sum := sha256.Sum256([]byte(token))
	return token, hex.EncodeToString(sum[:])
}

// Authenticate finds the identity of a token. It compares with every identity in constant time.
func (i *Identities) Authenticate(token string) (Identity, bool) {
	sum := sha256.Sum256([]byte(token))
	i.mu.RLock()
	defer i.mu.RUnlock()
	found := -1
	for n, id := range i.list {
		want, _ := hexHash(id.TokenSHA256)
		if subtle.ConstantTimeCompare(sum[:], want) == 1 {
			found = n
		}
	}
	if found < 0 {
		return Identity{}, false
	}
	return i.list[found], true
}

// List returns the identities by name.
func (i *Identities) List() []Identity {
	i.mu.RLock()
	defer i.mu.RUnlock()
	list := slices.Clone(i.list)
	slices.SortFunc(list, func(a, b Identity) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// Add makes an identity durable. Repeating it with the same token is a no-op; another one of that name is ErrIdentityExists.
func (i *Identities) Add(id Identity) (Identity, error) {
	if bad := id.problems(); len(bad) > 0 {
		return Identity{}, errors.New(strings.Join(bad, "; "))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, have := range i.list {
		switch {
		case have.Name == id.Name && have.TokenSHA256 == id.TokenSHA256 && slices.Equal(have.Scopes, id.Scopes) && slices.Equal(have.Teams, id.Teams):
			return have, nil
		case have.Name == id.Name:
			return Identity{}, ErrIdentityExists
		case have.TokenSHA256 == id.TokenSHA256:
			return Identity{}, ErrTokenTaken
		}
	}
	return id, i.replace(append(slices.Clone(i.list), id))
}

// Remove ends an identity at once. ErrNoIdentity, or ErrLastAdmin if nobody else could add identities.
func (i *Identities) Remove(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var rest []Identity
	admins := 0
	for _, id := range i.list {
		if id.Name == name {
			continue
		}
		rest = append(rest, id)
		if id.has(ScopeAdmin) {
			admins++
		}
	}
	switch {
	case len(rest) == len(i.list):
		return ErrNoIdentity
	case admins == 0:
		return ErrLastAdmin
	}
	return i.replace(rest)
}

// replace writes the list and then uses it; the caller holds mu, or is alone.
func (i *Identities) replace(list []Identity) error {
	b, err := json.MarshalIndent(identityFile{1, list}, "", "  ")
	if err != nil {
		return err
	}
	if err := writeOwned(i.path, append(b, '\n')); err != nil {
		return err
	}
	i.list = list
	return nil
}

// writeOwned replaces a file, readable by its owner only. A crash leaves the old one or the new one.
func writeOwned(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func hexHash(s string) ([]byte, bool) {
	b, err := hex.DecodeString(s)
	return b, err == nil
}

func validName(s string) bool { return credential.ValidName(s) }

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
