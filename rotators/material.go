package rotators

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
)

// The field names that consumers may rely on. A provider may add its own.
const (
	FieldUsername    = "username"
	FieldPassword    = "password"
	FieldDSN         = "dsn"
	FieldAccessKeyID = "access_key_id"
	FieldSecretKey   = "secret_access_key"
	FieldToken       = "token"
)

// ErrRedacted is what marshalling a secret gives: a secret leaves the process only through a store.
var ErrRedacted = errors.New("a secret cannot be marshalled")

// Material is the secret fields of one version, by name. The zero value is empty.
//
// It redacts itself in every form of printing and refuses to be marshalled, so that it cannot reach a log, an error, an
// event or the ledger by accident. Values are copied in and out.
type Material struct{ fields map[string][]byte }

// NewMaterial copies fields.
func NewMaterial(fields map[string][]byte) Material {
	m := Material{fields: make(map[string][]byte, len(fields))}
	for k, v := range fields {
		m.fields[k] = slices.Clone(v)
	}
	return m
}

// Text makes a Material of strings.
func Text(fields map[string]string) Material {
	m := Material{fields: make(map[string][]byte, len(fields))}
	for k, v := range fields {
		m.fields[k] = []byte(v)
	}
	return m
}

// Empty reports whether there are no fields.
func (m Material) Empty() bool { return len(m.fields) == 0 }

// Names lists the fields, sorted.
func (m Material) Names() []string { return slices.Sorted(maps.Keys(m.fields)) }

// Reveal returns a copy of one field's bytes, nil if there is no such field. The name is chosen to be found by a search.
func (m Material) Reveal(name string) []byte { return slices.Clone(m.fields[name]) }

// RevealAll returns a copy of every field.
func (m Material) RevealAll() map[string][]byte { return NewMaterial(m.fields).fields }

// Equal reports whether both hold the same fields with the same bytes.
func (m Material) Equal(o Material) bool { return maps.EqualFunc(m.fields, o.fields, slices.Equal) }

func (m Material) redacted() string { return fmt.Sprintf("[redacted %d fields]", len(m.fields)) }

// String, GoString, Format and LogValue print only how many fields there are.
func (m Material) String() string { return m.redacted() }

// GoString is String.
func (m Material) GoString() string { return m.redacted() }

// Format prints String for every verb.
func (m Material) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(m.redacted())) }

// LogValue is String.
func (m Material) LogValue() slog.Value { return slog.StringValue(m.redacted()) }

// MarshalJSON always fails with ErrRedacted.
func (m Material) MarshalJSON() ([]byte, error) { return nil, ErrRedacted }

// MarshalText always fails with ErrRedacted.
func (m Material) MarshalText() ([]byte, error) { return nil, ErrRedacted }
