package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/file"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/postgres"
)

// provider is one kind of target: what it adds to the configuration, and how its rotator is made.
type provider struct {
	config.Kind
	rotator func(t credential.Target, id credential.ID, s credential.Spec, d dependencies) (rotators.Rotator, error)
}

// dependencies are what the process gives a rotator, and the version that its credential took over, if any.
type dependencies struct {
	adopted rotators.VersionID
	resolve func(ctx context.Context, ref string) ([]byte, error)
	record  rotators.Recorder
}

// storeKind is one kind of store.
type storeKind struct {
	config.StoreKind
	open func(fields json.RawMessage) (store.Store, error)
	// read opens the store with a consumer's access only.
	read func(fields json.RawMessage) (reader, error)
}

// reader is the consumers' side of a store.
type reader interface {
	Get(ctx context.Context, credential string, stage store.Stage) (store.Secret, error)
}

// providers is the literal map of kinds: the only place that names them.
func providers() map[string]provider {
	return map[string]provider{
		"postgres": {
			Kind: config.Kind{
				Target: postgres.TargetConfig{}, Credential: postgres.CredentialConfig{},
				Traits: func(_, c json.RawMessage) (rotators.Traits, error) {
					cc, err := strict[postgres.CredentialConfig](c)
					return cc.Traits(), err
				},
				Validate: func(t, c json.RawMessage) error {
					tc, err := strict[postgres.TargetConfig](t)
					if err != nil {
						return err
					}
					cc, err := strict[postgres.CredentialConfig](c)
					if err != nil {
						return err
					}
					_, err = postgres.New(postgres.Config{Target: tc, Credential: cc, ID: "check", Resolve: resolve})
					return err
				},
				Claims: func(_, c json.RawMessage) []string {
					cc, _ := strict[postgres.CredentialConfig](c)
					return cc.Claims()
				},
				Issuer: func(t json.RawMessage) string {
					tc, _ := strict[postgres.TargetConfig](t)
					port := tc.Port
					if port == 0 {
						port = 5432
					}
					return "postgres://" + net.JoinHostPort(tc.Host, strconv.Itoa(port))
				},
				Slots: func(_, c json.RawMessage) []rotators.VersionID {
					cc, _ := strict[postgres.CredentialConfig](c)
					var ids []rotators.VersionID
					for _, role := range cc.Roles {
						ids = append(ids, rotators.VersionID(role))
					}
					return ids
				},
			},
			rotator: func(t credential.Target, id credential.ID, s credential.Spec, d dependencies) (rotators.Rotator, error) {
				tc, err := strict[postgres.TargetConfig](t.Fields)
				if err != nil {
					return nil, err
				}
				cc, err := strict[postgres.CredentialConfig](s.Fields)
				if err != nil {
					return nil, err
				}
				return postgres.New(postgres.Config{
					Target: tc, Credential: cc, ID: string(id), Adopted: d.adopted, Resolve: d.resolve, Record: d.record, Timeout: s.StepDeadline.D(),
				})
			},
		},
	}
}

// fileFields are what a store of kind file says in the configuration.
type fileFields struct {
	Dir        string           `json:"dir" jsonschema:"required,format=path" jsonschema_description:"Directory of the secrets, one age-encrypted file for each credential. Made with mode 0700 if missing."`
	Identity   config.Reference `json:"identity,omitempty" jsonschema:"format=reference" jsonschema_description:"The age key, as file:/path. Made on first use; the directory's name with .key appended if absent."`
	Recipients []string         `json:"recipients,omitempty" jsonschema_description:"More age public keys (age1…) that may read every secret."`
}

// Validate refuses an identity that is not a file.
func (f fileFields) Validate() error {
	if _, err := f.keyFile(); err != nil {
		return err
	}
	return file.Config{Dir: f.Dir, Recipients: f.Recipients}.Validate()
}

func (f fileFields) keyFile() (string, error) {
	if f.Identity == "" {
		return "", nil
	}
	path, ok := strings.CutPrefix(string(f.Identity), "file:")
	if !ok {
		return "", errors.New("identity: the key of a file store is a file: want file:/path")
	}
	return path, nil
}

// storeKinds is the literal map of stores.
func storeKinds() map[string]storeKind {
	return map[string]storeKind{
		"file": {
			StoreKind: config.StoreKind{Config: fileFields{}},
			open: func(fields json.RawMessage) (store.Store, error) {
				f, err := strict[fileFields](fields)
				if err != nil {
					return nil, err
				}
				key, err := f.keyFile()
				if err != nil {
					return nil, err
				}
				return file.New(file.Config{Dir: f.Dir, IdentityFile: key, Recipients: f.Recipients})
			},
			read: func(fields json.RawMessage) (reader, error) {
				f, err := strict[fileFields](fields)
				if err != nil {
					return nil, err
				}
				key, err := f.keyFile()
				if err != nil {
					return nil, err
				}
				return file.Open(file.ReadConfig{Dir: f.Dir, IdentityFile: key})
			},
		},
	}
}

// kinds is what the configuration needs to know of both maps.
func kinds() config.Kinds {
	k := config.Kinds{Targets: map[string]config.Kind{}, Stores: map[string]config.StoreKind{}}
	for name, p := range providers() {
		k.Targets[name] = p.Kind
	}
	for name, s := range storeKinds() {
		k.Stores[name] = s.StoreKind
	}
	return k
}

func resolve(ctx context.Context, ref string) ([]byte, error) {
	return config.Resolve(ctx, config.Reference(ref))
}

func strict[T any](b json.RawMessage) (T, error) {
	var v T
	if len(b) == 0 {
		return v, nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(&v)
	return v, err
}

// rotatorMaker makes rotators for the worker and for checks.
func rotatorMaker(log *slog.Logger) func(t credential.Target, id credential.ID, s credential.Spec, adopted rotators.VersionID) (rotators.Rotator, error) {
	known := providers()
	common := dependencies{
		resolve: resolve,
		record: func(_ context.Context, op rotators.Op, statement string) {
			log.Info("issuer statement", "credential", op.Credential, "generation", op.Generation, "op", op.ID.String(), "statement", statement)
		},
	}
	return func(t credential.Target, id credential.ID, s credential.Spec, adopted rotators.VersionID) (rotators.Rotator, error) {
		d := common
		d.adopted = adopted
		p, ok := known[t.Kind]
		if !ok {
			return nil, rotators.Faultf(rotators.Refused, "make rotator", "this build has no kind %q", t.Kind)
		}
		r, err := p.rotator(t, id, s, d)
		if err != nil {
			return nil, &rotators.Fault{Class: rotators.Refused, Step: "make rotator", Err: err}
		}
		return r, nil
	}
}

// openStores opens the configured stores on first use, each once.
type openStores struct {
	configured map[string]config.Store
	mu         sync.Mutex
	open       map[string]store.Store
}

func (o *openStores) get(name string) (store.Store, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s, ok := o.open[name]; ok {
		return s, nil
	}
	c, ok := o.configured[name]
	if !ok {
		return nil, fmt.Errorf("store %q is not in this process's configuration", name)
	}
	k, ok := storeKinds()[c.Kind]
	if !ok {
		return nil, fmt.Errorf("this build has no store kind %q", c.Kind)
	}
	s, err := k.open(c.Fields)
	if err != nil {
		return nil, err
	}
	if o.open == nil {
		o.open = map[string]store.Store{}
	}
	o.open[name] = s
	return s, nil
}

func (o *openStores) close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var errs []error
	for _, s := range o.open {
		errs = append(errs, s.Close())
	}
	o.open = nil
	return errors.Join(errs...)
}
