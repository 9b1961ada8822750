package config_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/rotators"
)

// The fake kind has the shape of a real one: a server with two login slots per credential, or one.

type fakeTarget struct {
	Host     string   `json:"host" jsonschema:"required" jsonschema_description:"Where the server is."`
	Port     int      `json:"port,omitempty" jsonschema:"minimum=1,maximum=65535,default=5432" jsonschema_description:"Its port."`
	Database string   `json:"database,omitempty" jsonschema_description:"What to connect to."`
	Admin    fakeUser `json:"admin" jsonschema:"required" jsonschema_description:"The engine's own access."`
	TLS      fakeTLS  `json:"tls,omitzero" jsonschema_description:"How the server is verified."`
}

type fakeUser struct {
	Username string `json:"username" jsonschema:"required" jsonschema_description:"The admin's name."`
	Password string `json:"password" jsonschema:"required,format=reference" jsonschema_description:"The admin's password."`
}

type fakeTLS struct {
	Mode   string `json:"mode,omitempty" jsonschema:"enum=verify-full,enum=disable,default=verify-full" jsonschema_description:"How much is verified."`
	CAFile string `json:"ca_file,omitempty" jsonschema:"format=path" jsonschema_description:"The authorities."`
}

func (t fakeTarget) Validate() error {
	var errs []error
	if t.Host == "nowhere" {
		errs = append(errs, fmt.Errorf("host %q: is not a host", t.Host))
	}
	if t.TLS.Mode == "disable" && t.Host != "localhost" {
		errs = append(errs, errors.New("tls.mode disable: the host is on a network"))
	}
	return errors.Join(errs...)
}

type fakeCredential struct {
	OwnerRole string   `json:"owner_role,omitempty" jsonschema_description:"Who owns what is created."`
	Roles     []string `json:"roles" jsonschema:"required,minItems=1,maxItems=2" jsonschema_description:"The logins."`
}

func (c fakeCredential) Validate() error {
	if len(c.Roles) == 2 && c.OwnerRole == "" {
		return errors.New("owner_role: missing; two roles need one")
	}
	return nil
}

type fakeStore struct {
	Dir      string `json:"dir" jsonschema:"required,format=path" jsonschema_description:"Directory of the files."`
	Identity string `json:"identity" jsonschema:"required,format=reference" jsonschema_description:"The key that opens them."`
}

func decoded[T any](b json.RawMessage) (v T) {
	if len(b) > 0 {
		if err := json.Unmarshal(b, &v); err != nil {
			panic(err)
		}
	}
	return v
}

func fakeKinds() config.Kinds {
	return config.Kinds{
		Targets: map[string]config.Kind{"postgres": {
			Target: fakeTarget{}, Credential: fakeCredential{},
			Traits: func(_, c json.RawMessage) (rotators.Traits, error) {
				return rotators.Traits{MaxLive: len(decoded[fakeCredential](c).Roles), Countable: true, Kills: true}, nil
			},
			Validate: func(t, c json.RawMessage) error {
				if slices.Contains(decoded[fakeCredential](c).Roles, decoded[fakeTarget](t).Admin.Username) {
					return errors.New("roles: one of them is the admin")
				}
				return nil
			},
			Claims: func(_, c json.RawMessage) []string {
				var out []string
				for _, r := range decoded[fakeCredential](c).Roles {
					out = append(out, "role/"+r)
				}
				return out
			},
			Issuer: func(t json.RawMessage) string {
				v := decoded[fakeTarget](t)
				return fmt.Sprint(v.Host, ":", v.Port)
			},
			Slots: func(_, c json.RawMessage) []rotators.VersionID {
				var out []rotators.VersionID
				for _, r := range decoded[fakeCredential](c).Roles {
					out = append(out, rotators.VersionID(r))
				}
				return out
			},
		}},
		Stores: map[string]config.StoreKind{"file": {Config: fakeStore{}}},
	}
}
