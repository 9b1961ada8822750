package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
)

// The exit codes; see exitCodesHelp.
const (
	exitOK           = 0
	exitError        = 1
	exitUsage        = 2
	exitRefused      = 3
	exitNotFound     = 4
	exitUnauthorised = 5
	exitUnreachable  = 6
	exitWait         = 7
	exitViolations   = 8
)

// exit is an error with its exit code.
type exit struct {
	code int
	err  error
}

func (e *exit) Error() string { return e.err.Error() }
func (e *exit) Unwrap() error { return e.err }

// errSilent ends a command with code 1 after it has said everything itself.
var errSilent = errors.New("")

// codeOf is the exit code of err.
func codeOf(err error) int {
	var e *exit
	var answer *api.Error
	var wrong config.Problems
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &e):
		return e.code
	case errors.As(err, &wrong):
		return exitUsage
	case errors.Is(err, api.ErrUnreachable):
		return exitUnreachable
	case !errors.As(err, &answer):
		return exitError
	}
	switch answer.Status {
	case 400, 422:
		return exitUsage
	case 401, 403:
		return exitUnauthorised
	case 404:
		return exitNotFound
	case 409:
		return exitRefused
	default:
		return exitError
	}
}

// app is what every command shares: the streams, the global flags and the clock.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	// started is true once flags and arguments were understood: an error before that is one of usage.
	started bool

	configPath string
	server     string
	tokenFile  string
	output     string
}

func (a *app) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&a.configPath, "config", "rekey.yaml", "configuration `file`")
	f.StringVar(&a.server, "server", "", "the server's `address`, unix:/path, 127.0.0.1:port or https://host:port (or REKEY_SERVER; default: the configuration's server.listen)")
	f.StringVar(&a.tokenFile, "token-file", "", "`file` that holds your token (or REKEY_TOKEN_FILE; default: admin.token in the configuration's server.data_dir)")
	f.StringVarP(&a.output, "output", "o", "table", "how results are shown: table or `json`")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) json() bool { return a.output == "json" }

// print shows a result: as JSON, or as text writes it. A nil text is JSON always.
func (a *app) print(v any, text func(io.Writer) error) error {
	if !a.json() && text != nil {
		return text(a.stdout)
	}
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// loadConfig reads the configuration and shows its warnings. dataDir, if not empty, overrides server.data_dir, and
// server.listen where that follows from it.
func (a *app) loadConfig(dataDir string) (config.Config, error) {
	cfg, err := config.Load(a.configPath, kinds())
	if err != nil {
		return config.Config{}, err
	}
	a.warn(cfg.Warnings)
	if dataDir == "" {
		return cfg, nil
	}
	abs, err := filepath.Abs(dataDir)
	if err != nil {
		return config.Config{}, err
	}
	if cfg.Server.Listen == defaultListen(cfg.Server.DataDir) {
		cfg.Server.Listen = defaultListen(abs)
	}
	cfg.Server.DataDir = abs
	return cfg, nil
}

func defaultListen(dataDir string) string { return "unix:" + filepath.Join(dataDir, "api.sock") }

func (a *app) warn(warnings config.Problems) {
	for _, w := range warnings {
		fmt.Fprintln(a.stderr, "warning:", w)
	}
}

// whereabouts is the part of the configuration that says where the server is. It is read leniently: a mistake in some credential
// must not keep anybody from killing another.
func (a *app) whereabouts() (listen, dataDir string, err error) {
	b, err := os.ReadFile(a.configPath)
	if err != nil {
		return "", "", err
	}
	var file struct {
		Server struct {
			DataDir string `yaml:"data_dir"`
			Listen  string `yaml:"listen"`
		} `yaml:"server"`
	}
	if err := yaml.Unmarshal(b, &file); err != nil {
		return "", "", fmt.Errorf("%s is not readable as YAML: `rekey validate` says where", a.configPath)
	}
	dir, err := filepath.Abs(filepath.Dir(a.configPath))
	if err != nil {
		return "", "", err
	}
	within := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	dataDir = file.Server.DataDir
	if dataDir == "" {
		dataDir = "data"
	}
	dataDir = within(dataDir)
	listen = file.Server.Listen
	if socket, ok := strings.CutPrefix(listen, "unix:"); ok {
		listen = "unix:" + within(socket)
	}
	if listen == "" {
		listen = defaultListen(dataDir)
	}
	return listen, dataDir, nil
}

// client makes the API's client: address and token from flags, else the environment, else the configuration.
func (a *app) client() (*api.Client, error) {
	address, tokenFile := a.server, a.tokenFile
	if address == "" {
		address = a.getenv("REKEY_SERVER")
	}
	if tokenFile == "" {
		tokenFile = a.getenv("REKEY_TOKEN_FILE")
	}
	if address == "" || tokenFile == "" {
		listen, dataDir, err := a.whereabouts()
		if err != nil {
			return nil, &exit{exitUsage, fmt.Errorf("where is the server? %w; give --config, or --server and --token-file (REKEY_SERVER, REKEY_TOKEN_FILE)", err)}
		}
		if address == "" {
			address = listen
		}
		if tokenFile == "" {
			tokenFile = filepath.Join(dataDir, api.AdminTokenFile)
		}
	}
	token, err := readToken(tokenFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, &exit{exitUnauthorised, fmt.Errorf("there is no token in %s: the server writes the first one when it starts (`rekey server --config %s`); otherwise name yours with --token-file or REKEY_TOKEN_FILE", tokenFile, a.configPath)}
	case errors.Is(err, os.ErrPermission):
		return nil, &exit{exitUnauthorised, fmt.Errorf("you may not read %s: run as the server's user, or name your own token with --token-file or REKEY_TOKEN_FILE", tokenFile)}
	case err != nil:
		return nil, &exit{exitUnauthorised, fmt.Errorf("token file %s: %w", tokenFile, err)}
	}
	c, err := api.NewClient(api.ClientConfig{Address: address, Token: token})
	if err != nil {
		return nil, &exit{exitUsage, err}
	}
	return c, nil
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	token := strings.TrimSpace(string(b))
	if err == nil && (token == "" || strings.ContainsAny(token, " \n\t")) {
		err = errors.New("want one token and nothing else")
	}
	return token, err
}

// explain adds what to do next to an error that a user can act upon.
func (a *app) explain(err error) string {
	text := err.Error()
	var answer *api.Error
	switch {
	case errors.Is(err, api.ErrUnreachable):
		return text + fmt.Sprintf("\nIs it running? Start it with `rekey server --config %s`, or name another with --server or REKEY_SERVER.", a.configPath)
	case errors.As(err, &answer) && answer.Status == 404 && strings.Contains(answer.Detail, "no credential"):
		return text + "\n`rekey status` lists what there is."
	}
	return text
}

// completeIDs completes credential ids from the server; nothing where it does not answer quickly.
func (a *app) completeIDs(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	const nothing = cobra.ShellCompDirectiveNoFileComp
	c, err := a.client()
	if err != nil {
		return nil, nothing
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	list, err := c.List(ctx, api.Filter{})
	if err != nil {
		return nil, nothing
	}
	var ids []string
	for _, v := range list {
		if strings.HasPrefix(v.ID, prefix) && !slices.Contains(args, v.ID) {
			ids = append(ids, cobra.CompletionWithDesc(v.ID, v.State+", "+v.Purpose))
		}
	}
	return ids, nothing
}

// completeOneID is completeIDs for commands with one argument.
func (a *app) completeOneID(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeIDs(cmd, args, prefix)
}

// parseIDs checks the form of every id before anything is sent.
func parseIDs(args []string) ([]credential.ID, error) {
	var ids []credential.ID
	var errs []error
	for _, arg := range args {
		id, err := credential.ParseID(arg)
		errs = append(errs, err)
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, &exit{exitUsage, err}
	}
	return ids, nil
}

// isTerminal reports whether a stream is one that a human sits at.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// version is the program's, as the build recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
