package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/config"
)

func newInitCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a commented rekey.yaml",
		Long: `Write a commented rekey.yaml to begin with. It is valid as it is; change it to name your own database.

An existing file is left alone unless --force is given.`,
		Example: `  rekey init
  rekey init /etc/rekey/rekey.yaml`,
		Args: cobra.MaximumNArgs(1),
	}
	force := c.Flags().Bool("force", false, "replace an existing file")
	c.RunE = func(_ *cobra.Command, args []string) error {
		path := a.configPath
		if len(args) == 1 {
			path = args[0]
		}
		flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
		if *force {
			flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
		}
		f, err := os.OpenFile(path, flags, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s exists already: use --force to replace it, or name another file", path)
		}
		if err != nil {
			return err
		}
		_, err = f.Write(config.Template())
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		return a.print(map[string]string{"file": path}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "wrote %s\nnext: edit it, then `rekey validate`, `rekey server` and `rekey apply`\n", path)
			return err
		})
	}
	return c
}

func newValidateCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "validate",
		Short: "Check the configuration: every mistake at once, with line and column",
		Long: `Check the configuration without contacting anything. Every mistake is reported at once, with file, line, column, field and what
to do. References to secrets are checked for their form, not read.`,
		Example: `  rekey validate
  rekey validate --config /etc/rekey/rekey.yaml --output json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := config.Load(a.configPath, kinds())
			var problems config.Problems
			if errors.As(err, &problems) && a.json() {
				if err := a.print(map[string]any{"valid": false, "problems": problems}, nil); err != nil {
					return err
				}
				return &exit{exitUsage, errSilent}
			}
			if err != nil {
				return err
			}
			a.warn(cfg.Warnings)
			result := map[string]any{"valid": true, "targets": len(cfg.Targets), "credentials": len(cfg.Credentials), "warnings": cfg.Warnings}
			return a.print(result, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s is valid: %s, %s\n", a.configPath, count(len(cfg.Targets), "target"), count(len(cfg.Credentials), "credential"))
				return err
			})
		},
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func newSchemaCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of rekey.yaml",
		Long:  "Print the JSON Schema of rekey.yaml, with every kind of target and store that this build knows, for editors and other tools.",
		Example: `  rekey schema > rekey.schema.json
  # then, as the first line of rekey.yaml:
  # yaml-language-server: $schema=rekey.schema.json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b, err := config.Schema(kinds())
			if err != nil {
				return err
			}
			_, err = a.stdout.Write(b)
			return err
		},
	}
}

func newPlanCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "plan",
		Short: "Say what apply would change; nothing is done",
		Long: `Compare the configuration with the server's inventory and say what ` + "`rekey apply`" + ` would change. Nothing is done, and no issuer is
asked. Applying never revokes or deletes anything: a credential that left the file stops rotating and keeps working.`,
		Example: `  rekey plan
  rekey plan --output json | jq '.changes[] | select(.action != "none")'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.declare(cmd, api.ApplyRequest{DryRun: true})
		},
	}
}

func newApplyCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "apply",
		Short: "Declare targets and credentials to the server",
		Long: `Declare the configuration's targets and credentials to the server. All problems are found before anything is written; a second
apply after an interrupted one makes the rest.

The server first asks the issuer of every credential that is new or changed whether it could be rotated there: reachable, admin and
privileges in order, and a random password refused. A new credential's first version is made at once; an adopted one is proven
and published as it is. Nothing is ever revoked or deleted by applying.`,
		Example: `  rekey apply
  rekey apply --dry-run
  rekey apply --no-probe   # while a database is down for maintenance`,
		Args: cobra.NoArgs,
	}
	dry := c.Flags().Bool("dry-run", false, "only say what would change, like rekey plan")
	unprobed := c.Flags().Bool("no-probe", false, "do not ask the issuers first")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.declare(cmd, api.ApplyRequest{DryRun: *dry, Unprobed: *unprobed})
	}
	return c
}

// declare sends the configuration and shows what came of it.
func (a *app) declare(cmd *cobra.Command, q api.ApplyRequest) error {
	cfg, err := a.loadConfig("")
	if err != nil {
		return err
	}
	client, err := a.client()
	if err != nil {
		return err
	}
	q.Targets, q.Credentials = cfg.Targets, cfg.Credentials
	res, err := client.Apply(cmd.Context(), q)
	if err != nil {
		return err
	}
	for _, warning := range res.Warnings {
		fmt.Fprintln(a.stderr, "warning:", warning)
	}
	if err := a.print(res, func(w io.Writer) error { return showChanges(w, res) }); err != nil {
		return err
	}
	switch {
	case res.Failed > 0:
		return fmt.Errorf("%s could not be made: apply again", count(res.Failed, "change"))
	case res.Refused > 0:
		return &exit{exitRefused, fmt.Errorf("%s cannot be made now; apply would do nothing", count(res.Refused, "change"))}
	}
	return nil
}

func showChanges(w io.Writer, res api.ApplyResult) error {
	made := 0
	for _, c := range res.Changes {
		if c.Action == config.None {
			continue
		}
		made++
		if _, err := fmt.Fprintln(w, c.String()); err != nil {
			return err
		}
		if c.Error != "" {
			if _, err := fmt.Fprintf(w, "    failed: %s\n", c.Error); err != nil {
				return err
			}
		}
	}
	var summary string
	switch {
	case made == 0:
		summary = "nothing to change"
	case res.Applied:
		summary = count(made-res.Failed, "change") + " made"
	default:
		summary = count(made, "change") + " to make; nothing was done"
	}
	_, err := fmt.Fprintln(w, summary)
	return err
}
