package api

import (
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestIdentities(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	for _, file := range []string{IdentitiesFile, AdminTokenFile} {
		info, err := os.Stat(filepath.Join(e.dir, file))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", file, info.Mode(), err)
		}
	}
	err := e.admin.RemoveIdentity(ctx, "admin") // invariant 12
	refused(t, err, http.StatusConflict, "the last identity with the scope admin")
	ci := e.as("ci", nil, ScopeRead)
	if _, err := ci.List(ctx, Filter{}); err != nil {
		t.Error(err)
	}
	list, err := e.admin.Identities(ctx)
	if err != nil || len(list) != 2 || list[1].Name != "ci" || list[1].CreatedBy != "admin" {
		t.Errorf("list: %+v %v", list, err)
	}
	_, hash := NewToken()
	_, err = e.admin.AddIdentity(ctx, NewIdentity{Name: "ci", Scopes: []Scope{ScopeRead}, TokenSHA256: hash})
	refused(t, err, http.StatusConflict, "there is an identity of that name")
	_, err = e.admin.AddIdentity(ctx, NewIdentity{Name: "scheduler", Scopes: []Scope{"root"}, Teams: []string{"*"}, TokenSHA256: "short"})
	refused(t, err, http.StatusUnprocessableEntity, "name \"scheduler\"", `scope "root"`, `team "*"`, "token_sha256")
	_, err = e.admin.AddIdentity(ctx, NewIdentity{Name: "half", Scopes: []Scope{ScopeAdmin}, Teams: []string{"orders"}, TokenSHA256: hash})
	refused(t, err, http.StatusUnprocessableEntity, "it could give itself any other")
	refused(t, e.admin.RemoveIdentity(ctx, "nobody"), http.StatusNotFound)

	// A second admin may remove the first, and what is removed is out at once.
	second := e.as("second", nil, ScopeAdmin)
	if err := second.RemoveIdentity(ctx, "admin"); err != nil {
		t.Error(err)
	}
	_, err = e.admin.Identities(ctx)
	refused(t, err, http.StatusUnauthorized, "unknown or was removed")
	refused(t, second.RemoveIdentity(ctx, "second"), http.StatusConflict, "last identity")

	// A restart knows the same, and makes no new admin.
	again, err := OpenIdentities(e.dir, time.Now())
	if err != nil || len(again.List()) != 2 {
		t.Fatalf("after a restart: %v %v", again, err)
	}
	if _, ok := again.Authenticate(ci.token); !ok {
		t.Error("ci's token does not work after a restart")
	}
	if _, ok := again.Authenticate(e.admin.token); ok {
		t.Error("a removed token works after a restart")
	}
	b, err := os.ReadFile(filepath.Join(e.dir, IdentitiesFile))
	if err != nil || strings.Contains(string(b), ci.token) || strings.Contains(string(b), ci.token[6:]) {
		t.Error("the file holds a token")
	}
}

func TestIdentitiesFile(t *testing.T) {
	dir := t.TempDir()
	// A crash after the token and before the identity: the next start makes another token.
	if err := os.WriteFile(filepath.Join(dir, AdminTokenFile), []byte("rekey_half\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ids, err := OpenIdentities(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := ids.Authenticate("rekey_half"); ok {
		t.Error("a token that no identity was made for works")
	}
	token, err := os.ReadFile(filepath.Join(dir, AdminTokenFile))
	if err != nil {
		t.Fatal(err)
	}
	if id, ok := ids.Authenticate(strings.TrimSpace(string(token))); !ok || id.Name != "admin" || len(id.Scopes) != len(Scopes()) {
		t.Errorf("admin: %+v %v", id, ok)
	}
	path := filepath.Join(dir, IdentitiesFile)
	good, _ := os.ReadFile(path)
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		says    string
	}{
		"readable by others": {string(good), 0o644, "chmod 600"},
		"cut off":            {string(good[:len(good)/2]), 0o600, "is damaged"},
		"empty":              {"", 0o600, "is damaged"},
		"newer":              {strings.Replace(string(good), `"version": 1`, `"version": 2`, 1), 0o600, "version 2"},
		"unknown scope":      {strings.Replace(string(good), `"read"`, `"everything"`, 1), 0o600, `scope "everything"`},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenIdentities(dir, time.Now()); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		if b, _ := os.ReadFile(path); string(b) != c.content {
			t.Errorf("%s: the file was changed", name)
		}
	}
}

// A write that fails changes nothing: neither the file nor who may do what.
func TestIdentitiesDiskFails(t *testing.T) {
	dir := t.TempDir()
	ids, err := OpenIdentities(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ids.path = filepath.Join(dir, "missing", IdentitiesFile)
	token, hash := NewToken()
	if _, err := ids.Add(Identity{Name: "ci", Scopes: []Scope{ScopeRead}, TokenSHA256: hash}); err == nil {
		t.Error("added without being written")
	}
	if _, ok := ids.Authenticate(token); ok {
		t.Error("a token works that would be gone after a restart")
	}
}

func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "s")
	l, err := Listen(ListenConfig{Address: "unix:" + path})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", info.Mode(), err)
	}
	if _, err := Listen(ListenConfig{Address: "unix:" + path}); err == nil || !strings.Contains(err.Error(), "another server listens there") {
		t.Errorf("a live socket was taken: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays after a clean stop: %v", err)
	}

	// Another program's live socket is left alone; a dead one's is replaced; a file is not.
	foreign, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(ListenConfig{Address: "unix:" + path}); err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("a foreign socket was taken: %v", err)
	}
	foreign.SetUnlinkOnClose(false)
	foreign.Close()
	if l, err = Listen(ListenConfig{Address: "unix:" + path}); err != nil {
		t.Fatalf("a dead socket stops us: %v", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(ListenConfig{Address: "unix:" + path}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file was replaced: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}

	for address, says := range map[string]string{
		"0.0.0.0:0": "not loopback", ":0": "not loopback", "192.0.2.1:1": "not loopback", "example.com:80": "not loopback", "nonsense": "want unix:/path",
	} {
		if l, err := Listen(ListenConfig{Address: address}); err == nil || !strings.Contains(err.Error(), says) {
			if l != nil {
				l.Close()
			}
			t.Errorf("%s: %v, want %q", address, err, says)
		}
	}
	if l, err = Listen(ListenConfig{Address: "127.0.0.1:0"}); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
	if _, err := Listen(ListenConfig{Address: "127.0.0.1:0", CertFile: filepath.Join(dir, "none"), KeyFile: "none"}); err == nil {
		t.Error("listens without its certificate")
	}
}
