// Package config turns rekey.yaml into a validated desired state, and a desired state into a plan.
//
// Reading is strict: an unknown key, a duplicate one, a wrong type or a reference that leads nowhere is an error with file,
// line, column and field, and all of them are reported at once. What a provider or a store adds to the file comes in as
// [Kinds]; the schema, the editor's help and the reference page are made from the same Go types that are decoded.
package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// Kinds are the kinds of targets and of stores that a configuration may name.
type Kinds struct {
	Targets map[string]Kind
	Stores  map[string]StoreKind
}

// Kind is what one provider adds. Target and Credential are zero values of its configuration structs, whose json and
// jsonschema tags make the schema; `format=reference` marks a field that holds a secret by reference and `format=path` one
// that holds a path, relative to the configuration file. Where such a struct has a method Validate() error, it is called
// on the decoded value.
//
// The functions receive the fields as they are in [credential.Target] and [credential.Spec]: JSON, paths absolute. They
// have no effect anywhere. Only Traits is required.
type Kind struct {
	Target     any
	Credential any
	// Traits are those of a credential as configured.
	Traits func(target, credential json.RawMessage) (rotators.Traits, error)
	// Validate finds what is wrong between a target and its credential.
	Validate func(target, credential json.RawMessage) error
	// Claims names what a credential changes at its issuer; no two credentials share a claim at one issuer.
	Claims func(target, credential json.RawMessage) []string
	// Issuer identifies the server behind a target, so that two targets of one server share their claims. Nil: each
	// target is a server of its own.
	Issuer func(target json.RawMessage) string
	// Slots are the version ids that may ever exist. Nil: the issuer chooses them.
	Slots func(target, credential json.RawMessage) []rotators.VersionID
}

// StoreKind is what one kind of store adds; see [Kind].
type StoreKind struct {
	Config any
}

// Config is the desired state: complete, every default filled in, every path absolute, no secret in it.
type Config struct {
	// Path is the file's, absolute.
	Path        string                            `json:"path"`
	Server      Server                            `json:"server"`
	NATS        NATS                              `json:"nats"`
	Stores      map[string]Store                  `json:"stores"`
	Targets     []credential.Target               `json:"targets"` // by name
	Credentials map[credential.ID]credential.Spec `json:"credentials"`
	// Slots are the version ids that may exist for a credential, where its kind has a fixed set.
	Slots map[credential.ID][]rotators.VersionID `json:"slots,omitempty"`
	// Warnings do not keep the configuration from being used.
	Warnings Problems `json:"warnings,omitempty"`
}

// Server is how the process runs.
type Server struct {
	DataDir string `json:"data_dir"`
	Listen  string `json:"listen"` // unix:/path or host:port on loopback
	Log     Log    `json:"log"`
}

// Log is what the process writes about itself.
type Log struct {
	Level  string `json:"level"`  // debug, info, warn or error
	Format string `json:"format"` // text or json
}

// NATS is where the ledger lives. An empty URL means the embedded server.
type NATS struct {
	URL      string    `json:"url,omitempty"`
	Creds    Reference `json:"creds,omitempty"`
	TLS      TLS       `json:"tls,omitzero"`
	Replicas int       `json:"replicas"`
	Port     int       `json:"port,omitempty"` // the embedded server's
}

// TLS is how the NATS server is verified. The zero value trusts the system's authorities.
type TLS struct {
	CAFile   string `json:"ca_file,omitempty" jsonschema:"format=path" jsonschema_description:"PEM file of the authorities to trust instead of the system's."`
	CertFile string `json:"cert_file,omitempty" jsonschema:"format=path" jsonschema_description:"PEM file of the engine's own certificate."`
	KeyFile  string `json:"key_file,omitempty" jsonschema:"format=path" jsonschema_description:"PEM file of that certificate's key."`
}

// Store is one place that consumers read.
type Store struct {
	Kind   string          `json:"kind"`
	Fields json.RawMessage `json:"fields,omitempty"`
}

// Load reads and checks the file. Its error is a [Problems] with everything that is wrong with it, or tells that kinds is
// inconsistent, which is a defect of the program.
func Load(path string, kinds Kinds) (Config, error) {
	r := &report{file: path}
	data := read(r, path)
	if len(r.problems) > 0 {
		return Config{}, r.problems
	}
	return parse(r, path, data, kinds)
}

// Parse is Load of data, as if it stood in the file at path.
func Parse(path string, data []byte, kinds Kinds) (Config, error) {
	return parse(&report{file: path}, path, data, kinds)
}

func read(r *report, path string) []byte {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		r.add(position{}, nil, "`rekey init` writes a commented example", "there is no such file")
		return nil
	case err != nil:
		r.add(position{}, nil, "", "cannot be read: %v", reason(err))
		return nil
	case !info.Mode().IsRegular():
		r.add(position{}, nil, "", "it is not a regular file")
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		r.add(position{}, nil, "run as a user that may read it", "cannot be read: %v", reason(err))
		return nil
	}
	defer f.Close()
	if info.Mode().Perm()&0o002 != 0 {
		r.warnings = append(r.warnings, Problem{
			File:    r.file,
			Message: fmt.Sprintf("everybody may write it (mode %04o), and so decide what is rotated where", info.Mode().Perm()),
			Remedy:  "chmod o-w " + path,
		})
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		r.add(position{}, nil, "", "cannot be read: %v", reason(err))
	}
	return data
}

func parse(r *report, path string, data []byte, kinds Kinds) (Config, error) {
	full, err := filepath.Abs(path)
	if err != nil {
		return Config{}, fmt.Errorf("find %s: %w", path, err)
	}
	s, err := compile(kinds)
	if err != nil {
		return Config{}, err
	}
	root := parseYAML(r, data)
	if root == nil {
		return Config{}, r.problems.sorted()
	}
	c := checker{report: r, schema: s, kinds: kinds, dir: filepath.Dir(full), root: root}
	out := c.check()
	if len(r.problems) > 0 {
		return Config{}, r.problems.sorted()
	}
	out.Path, out.Warnings = full, r.warnings
	return out, nil
}
