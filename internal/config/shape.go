package config

import (
	"github.com/rekeyhq/rekey/internal/credential"
)

// The file's shape. The schema, the reference page and the decoder are all made from these types; what they lack is filled
// in by check.go.

type fileRoot struct {
	Version     int            `json:"version" jsonschema:"required,enum=1" jsonschema_description:"Version of this file's format: 1."`
	Server      fileServer     `json:"server,omitempty" jsonschema_description:"How the server runs."`
	NATS        fileNATS       `json:"nats,omitempty" jsonschema_description:"Where the ledger lives. Without url the server embeds NATS and keeps everything in data_dir."`
	Defaults    fileDefaults   `json:"defaults,omitempty" jsonschema_description:"For every credential that does not say it itself."`
	Stores      map[string]any `json:"stores,omitempty" jsonschema:"required" jsonschema_description:"Where consumers read secrets, by name."`
	Targets     map[string]any `json:"targets,omitempty" jsonschema_description:"The issuers that hold credentials, by name."`
	Credentials map[string]any `json:"credentials,omitempty" jsonschema_description:"What is rotated, by id: team/name."`
}

type fileServer struct {
	DataDir string  `json:"data_dir,omitempty" jsonschema:"format=path,default=data,minLength=1" jsonschema_description:"Directory for the ledger and the server's own keys."`
	Listen  string  `json:"listen,omitempty" jsonschema:"minLength=1" jsonschema_description:"Where the API listens: unix:/path or 127.0.0.1:port. Default: unix:<data_dir>/api.sock."`
	Log     fileLog `json:"log,omitempty" jsonschema_description:"What the server writes about itself, on standard error."`
}

type fileLog struct {
	Level  string `json:"level,omitempty" jsonschema:"enum=debug,enum=info,enum=warn,enum=error,default=info" jsonschema_description:"Least severity that is written."`
	Format string `json:"format,omitempty" jsonschema:"enum=text,enum=json,default=text" jsonschema_description:"One line of text or one JSON object per entry."`
}

type fileNATS struct {
	URL      string    `json:"url,omitempty" jsonschema:"minLength=1" jsonschema_description:"External NATS (>= 2.12): nats://host:4222 or tls://host:4222, several joined by commas. No user or password in it: use creds."`
	Creds    Reference `json:"creds,omitempty" jsonschema_description:"Reference to the credentials file of the engine's NATS user. Only with url."`
	TLS      TLS       `json:"tls,omitzero" jsonschema_description:"How the external server is verified. Only with url."`
	Replicas int       `json:"replicas,omitempty" jsonschema:"enum=1,enum=3,enum=5,default=1" jsonschema_description:"Copies of the ledger that the cluster keeps. More than 1 only with url."`
	Port     int       `json:"port,omitempty" jsonschema:"minimum=1,maximum=65535,default=4222" jsonschema_description:"Port of the embedded server on 127.0.0.1. Only without url."`
}

type fileDefaults struct {
	Store        string               `json:"store,omitempty" jsonschema:"default=default" jsonschema_description:"Name of the store."`
	Every        *credential.Duration `json:"every,omitempty" jsonschema_description:"Rotation interval; 0s rotates only on request."`
	Jitter       *credential.Duration `json:"jitter,omitempty" jsonschema_description:"Rotations come at most this much later, spread over the credentials. Default: 0s."`
	Overlap      fileOverlap          `json:"overlap,omitempty" jsonschema_description:"How long old and new both work."`
	StepDeadline *credential.Duration `json:"step_deadline,omitempty" jsonschema_description:"Bound of one step at the issuer or the store, retries included. Default: the target's."`
}

type fileOverlap struct {
	Min *credential.Duration `json:"min,omitempty" jsonschema_description:"The old version works at least this long. Default: 1h, or a quarter of every if that is less."`
	Max *credential.Duration `json:"max,omitempty" jsonschema_description:"It ends after this even if a required consumer has not acknowledged. Default: 24h, or half of every if that is less, and at least min."`
}

type fileStore struct {
	Kind string `json:"kind" jsonschema:"required" jsonschema_description:"Kind of store."`
}

type fileTarget struct {
	Kind         string               `json:"kind" jsonschema:"required" jsonschema_description:"Kind of issuer."`
	Environment  string               `json:"environment" jsonschema:"required,minLength=1,maxLength=63" jsonschema_description:"Environment, such as production. Its credentials must be of the same one."`
	Owner        string               `json:"owner" jsonschema:"required,minLength=1,maxLength=63" jsonschema_description:"Team that answers for it. Its credentials must have the same owner."`
	Concurrency  int                  `json:"concurrency,omitempty" jsonschema:"minimum=1,maximum=1000,default=4" jsonschema_description:"Credentials worked on at once, across all workers."`
	StepDeadline *credential.Duration `json:"step_deadline,omitempty" jsonschema_description:"Bound of one step, retries included. Default: 30s."`
	Exclusive    bool                 `json:"exclusive,omitempty" jsonschema:"default=false" jsonschema_description:"Nobody but rekey makes versions there, so an unknown one is rekey's own after a lost reply."`
}

type fileCredential struct {
	Target       string               `json:"target" jsonschema:"required" jsonschema_description:"Name of the target that holds it."`
	Store        string               `json:"store,omitempty" jsonschema_description:"Name of the store. Default: defaults.store, then default."`
	Owner        string               `json:"owner" jsonschema:"required,minLength=1,maxLength=63" jsonschema_description:"Team that answers for it; the target's."`
	Environment  string               `json:"environment" jsonschema:"required,minLength=1,maxLength=63" jsonschema_description:"Environment, such as production; the target's."`
	Purpose      string               `json:"purpose" jsonschema:"required,minLength=1,maxLength=200" jsonschema_description:"What it is used for, for whoever has to decide about it one day."`
	Labels       map[string]string    `json:"labels,omitempty" jsonschema_description:"Free text by name, for filters."`
	Every        *credential.Duration `json:"every,omitempty" jsonschema_description:"Rotation interval; 0s rotates only on request. Required here or in defaults."`
	Jitter       *credential.Duration `json:"jitter,omitempty" jsonschema_description:"Rotations come at most this much later, spread over the credentials. Default: 0s."`
	Overlap      fileOverlap          `json:"overlap,omitempty" jsonschema_description:"How long old and new both work."`
	AllowGap     bool                 `json:"allow_gap,omitempty" jsonschema:"default=false" jsonschema_description:"Accept that at each rotation no stored secret works for a moment, where the issuer holds one version only."`
	StepDeadline *credential.Duration `json:"step_deadline,omitempty" jsonschema_description:"Bound of one step, retries included. Default: the target's."`
	Consumers    []fileConsumer       `json:"consumers,omitempty" jsonschema:"maxItems=100" jsonschema_description:"Who reads it."`
	Adopt        *fileAdopt           `json:"adopt,omitempty" jsonschema_description:"Take a credential that exists already into the inventory, without changing it. Counts once, when it is first applied."`
}

type fileConsumer struct {
	Name     string `json:"name" jsonschema:"required" jsonschema_description:"The consumer's name."`
	Required bool   `json:"required,omitempty" jsonschema:"default=false" jsonschema_description:"The old version waits for its acknowledgement, up to overlap.max."`
}

type fileAdopt struct {
	Version  string               `json:"version" jsonschema:"required,minLength=1" jsonschema_description:"The issuer's id of the version in use now, such as the role's name."`
	Material map[string]Reference `json:"material" jsonschema:"required,minProperties=1" jsonschema_description:"Its secret's fields, by reference: username, password, …"`
}
