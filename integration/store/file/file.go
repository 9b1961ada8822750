// Package file keeps secrets in age-encrypted files, one per credential, for consumers on the same machine.
//
// A file is named team.name.age and holds one JSON document with all three stages, so that every change is one atomic
// replacement. It is read without rekey by `age -d -i KEY orders.db.age | jq -r '.current.fields.password|@base64d'`.
package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"filippo.io/age"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

// Config says where the secrets are. Only Dir is required.
type Config struct {
	// Dir holds the secrets. It is created with mode 0700 if missing, and refused if it belongs to another user or lets
	// group or others in.
	Dir string
	// IdentityFile holds the age key (AGE-SECRET-KEY-1…, mode 0600); empty means Dir with ".key" appended. The first
	// key in it encrypts, all of them decrypt. It is generated if missing, but only while Dir holds no secret.
	IdentityFile string
	// Recipients are further age public keys (age1…) that every secret is also encrypted to. They open all three stages.
	Recipients []string

	// failpoint is called at every step of a change; a test dies there.
	failpoint func(point string)
}

// Validate returns every problem of c, joined.
func (c Config) Validate() error {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("dir: missing"))
	}
	for _, r := range c.Recipients {
		if _, err := age.ParseX25519Recipient(r); err != nil {
			errs = append(errs, fmt.Errorf("recipients: %q is not an age public key (age1…)", r))
		}
	}
	return errors.Join(errs...)
}

// Store is a [store.Store] in a directory. Any number of Stores, in any number of processes of one user on one machine, may
// share it. A crash at any instant, power cuts included, leaves every credential as before or as after the call.
type Store struct {
	reader     *Reader
	recipients []age.Recipient
	closed     atomic.Bool

	// What changes the disk; tests replace these to see that the suite notices.
	lock    func(ctx context.Context, path string) (release func(), err error)
	replace func(path string, data []byte) error
	reach   func(point string)
}

var _ store.Store = (*Store)(nil)

// New opens the directory, makes what is missing, and removes what a crashed writer left. It fails with class Refused
// where directory or key are unsafe, or the key does not open the secrets that are there.
func New(cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, &rotators.Fault{Class: rotators.Refused, Step: "open file store", Err: err}
	}
	s := &Store{lock: flock, reach: cfg.failpoint}
	s.replace = s.replaceAtomically
	if s.reach == nil {
		s.reach = func(string) {}
	}
	dir, err := prepareDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	keyPath, err := identityPath(dir, cfg.IdentityFile)
	if err != nil {
		return nil, err
	}
	if err := s.ensureIdentity(dir, keyPath); err != nil {
		return nil, err
	}
	if s.reader, err = openReader(dir, keyPath); err != nil {
		return nil, err
	}
	own, ok := s.reader.identities[0].(*age.X25519Identity)
	if !ok {
		return nil, rotators.Faultf(rotators.Refused, "read key "+keyPath, "its first key is not an X25519 one (AGE-SECRET-KEY-1…)")
	}
	s.recipients = []age.Recipient{own.Recipient()}
	for _, text := range cfg.Recipients {
		r, err := age.ParseX25519Recipient(text)
		if err != nil {
			return nil, &rotators.Fault{Class: rotators.Refused, Step: "open file store", Err: err}
		}
		s.recipients = append(s.recipients, r)
	}
	if err := s.reader.checkKey(); err != nil {
		return nil, err
	}
	return s, s.removeLeftovers()
}

// Stage implements [store.Store].
func (s *Store) Stage(ctx context.Context, n store.Secret) (store.Secret, error) {
	step := "stage " + n.Key.String()
	if err := checkFields(n.Material); err != nil {
		return store.Secret{}, &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	var held store.Secret
	err := s.change(ctx, step, n.Key.Credential, func(was store.Slots) (now store.Slots, err error) {
		now, held, err = was.Stage(n)
		return now, err
	})
	if err != nil {
		return store.Secret{}, err
	}
	return held, nil
}

// Promote implements [store.Store].
func (s *Store) Promote(ctx context.Context, to, from store.Key) error {
	return s.change(ctx, "promote "+to.String(), to.Credential, func(was store.Slots) (store.Slots, error) {
		return was.Promote(to, from)
	})
}

// Get implements [store.Store]. It takes no lock and never waits for a writer.
func (s *Store) Get(ctx context.Context, credential string, stage store.Stage) (store.Secret, error) {
	if err := s.usable("read " + credential); err != nil {
		return store.Secret{}, err
	}
	return s.reader.Get(ctx, credential, stage)
}

// Discard implements [store.Store].
func (s *Store) Discard(ctx context.Context, k store.Key) error {
	return s.change(ctx, "discard "+k.String(), k.Credential, func(was store.Slots) (store.Slots, error) { return was.Discard(k), nil })
}

// Destroy implements [store.Store].
func (s *Store) Destroy(ctx context.Context, k store.Key) error {
	return s.change(ctx, "destroy "+k.String(), k.Credential, func(was store.Slots) (store.Slots, error) { return was.Destroy(k), nil })
}

// probeSize is how much room Writable wants beside what the credential's file takes already.
const probeSize = 64 << 10

// Writable implements [store.Store]. It reads the credential's file and writes, syncs and removes a larger one.
func (s *Store) Writable(ctx context.Context, credential string) error {
	step := "try to write " + credential
	path, release, err := s.enter(ctx, step, credential)
	if err != nil {
		return err
	}
	defer release()
	if _, err := s.reader.load(step, credential); err != nil {
		return err
	}
	size := int64(probeSize)
	if info, err := os.Stat(path); err == nil {
		size += info.Size()
	}
	temp, err := s.writeTemp(path, make([]byte, size))
	if err != nil {
		return classify(rotators.Transient, step, err)
	}
	if err := os.Remove(temp); err != nil {
		return classify(rotators.Transient, step, err)
	}
	return nil
}

// Reference implements [store.Store]: file: and the absolute path.
func (s *Store) Reference(credential string) string { return "file:" + s.reader.path(credential) }

// Close implements [store.Store]. Later calls are Refused; calls in progress finish.
func (s *Store) Close() error { s.closed.Store(true); return nil }

func (s *Store) usable(step string) error {
	if s.closed.Load() {
		return rotators.Faultf(rotators.Refused, step, "the store is closed")
	}
	return nil
}

// enter checks the id and that the directory is still the one that was opened, and locks the credential.
func (s *Store) enter(ctx context.Context, step, credential string) (path string, release func(), err error) {
	if err := s.usable(step); err != nil {
		return "", nil, err
	}
	if err := store.CheckCredential(credential); err != nil {
		return "", nil, &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	if err := s.reader.present(step); err != nil {
		return "", nil, err
	}
	release, err = s.lock(ctx, lockPath(s.reader.dir, credential))
	if err != nil {
		return "", nil, classify(rotators.Transient, step, err)
	}
	return s.reader.path(credential), release, nil
}

// change reads the credential's document, lets decide choose the next one and makes that durable, all under its lock.
func (s *Store) change(ctx context.Context, step, credential string, decide func(store.Slots) (store.Slots, error)) error {
	path, release, err := s.enter(ctx, step, credential)
	if err != nil {
		return err
	}
	defer release()
	was, err := s.reader.load(step, credential)
	if err != nil {
		return err
	}
	now, err := decide(was)
	if err != nil {
		return err
	}
	s.reach("decided")
	if now == was {
		// The change may be that of a process which died between rename and sync: it must not be lost any more.
		return s.syncDir(step)
	}
	if now == (store.Slots{}) {
		if err := os.Remove(path); err != nil {
			return classify(rotators.Transient, step, err)
		}
		s.reach("renamed")
		return s.syncDir(step)
	}
	sealed, err := seal(credential, now, s.recipients)
	if err != nil {
		return &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	if err := s.replace(path, sealed); err != nil {
		return classify(rotators.Transient, step, err)
	}
	return s.syncDir(step)
}

// syncDir makes the last rename or removal durable. Its failure is Unsure: the change is visible and may not survive a power cut.
func (s *Store) syncDir(step string) error {
	if err := syncDir(s.reader.dir); err != nil {
		return classify(rotators.Unsure, step, err)
	}
	s.reach("durable")
	return nil
}
