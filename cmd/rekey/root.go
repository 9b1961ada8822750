package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

const exitCodesHelp = `Every command ends with one of these codes:

  0  done
  1  error
  2  usage: an unknown flag or argument, or a declaration that is wrong
  3  refused: the credential's state does not allow it
  4  not found
  5  not authorised: no token, an unknown one, or one without the scope
  6  the server did not answer
  7  --wait: failed, parked, interrupted or too long; the request was accepted
  8  audit verify found violations

With several ids the code is that of the first failure; the others are done all the same.`

// newRoot makes the command `rekey`.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "rekey",
		Short: "Rotate credentials without anybody noticing",
		Long: `rekey rotates the credentials of databases, clouds and services: a new version is made, proven and published, both work for an
overlap, then the old one is ended and proven dead. Every step is committed before it is taken.

Begin with ` + "`rekey init`" + `, ` + "`rekey server`" + ` and ` + "`rekey apply`" + `; then ` + "`rekey status`" + ` shows what there is.`,
		Example: `  rekey status
  rekey rotate orders/db --wait
  rekey kill orders/db --reason "password in a public log"`,
		SilenceUsage: true, SilenceErrors: true, DisableAutoGenTag: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return fmt.Errorf("--output %q: want table or json", a.output)
			}
			a.started = true
			return nil
		},
	}
	a.flags(root)
	groups := []struct {
		title    string
		commands []*cobra.Command
	}{
		{"Declare and run:", []*cobra.Command{
			newInitCommand(a), newValidateCommand(a), newPlanCommand(a), newApplyCommand(a), newSchemaCommand(a),
			newServerCommand(a), newSchedulerCommand(a), newWorkerCommand(a),
		}},
		{"See:", []*cobra.Command{newStatusCommand(a), newGetCommand(a), newTargetsCommand(a), newEventsCommand(a), newAuditCommand(a)}},
		{"Rotate:", []*cobra.Command{
			newRotateCommand(a), newHoldCommand(a), newRollbackCommand(a), newPauseCommand(a), newResumeCommand(a),
		}},
		{"Emergency:", []*cobra.Command{newKillCommand(a), newReplaceCommand(a), newRestoreCommand(a)}},
		{"Other:", []*cobra.Command{newIdentityCommand(a), newVersionCommand(a)}},
	}
	for _, g := range groups {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title})
		for _, c := range g.commands {
			c.GroupID = g.title
			root.AddCommand(c)
		}
	}
	root.SetHelpCommandGroupID("Other:")
	root.SetCompletionCommandGroupID("Other:")
	root.AddCommand(&cobra.Command{Use: "exit-codes", Short: "The exit codes", Long: exitCodesHelp})
	wrapHelp(root)
	return root
}

// wrapHelp breaks the paragraphs of every command's help at 80 columns. Lines that are indented stay as they are.
func wrapHelp(c *cobra.Command) {
	c.Long = wrapped(c.Long, 80)
	for _, sub := range c.Commands() {
		wrapHelp(sub)
	}
}

func wrapped(text string, width int) string {
	var b strings.Builder
	column := 0
	for line := range strings.SplitSeq(text, "\n") {
		if line == "" || strings.HasPrefix(line, " ") {
			if column > 0 {
				b.WriteByte('\n')
			}
			b.WriteString(line + "\n")
			column = 0
			continue
		}
		for word := range strings.FieldsSeq(line) {
			switch {
			case column == 0:
			case column+1+len(word) > width:
				b.WriteByte('\n')
				column = 0
			default:
				b.WriteByte(' ')
				column++
			}
			b.WriteString(word)
			column += len(word)
		}
	}
	return strings.TrimRight(b.String(), "\n")
}

// run is the program: it returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, getenv: getenv, now: time.Now}
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	var coded *exit
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errSilent):
		return codeOf(err)
	case errors.Is(err, context.Canceled) && !errors.As(err, &coded):
		fmt.Fprintln(stderr, "rekey: interrupted; what was asked for may have begun: see `rekey status`")
		return exitWait
	case !a.started && !errors.As(err, &coded):
		fmt.Fprintf(stderr, "rekey: %s\nSee `%s --help`.\n", strings.TrimSpace(err.Error()), cmd.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(stderr, "rekey: %s\n", a.explain(err))
	return codeOf(err)
}

// group is a command that only holds others.
func group(use, short, long, example string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Long: long, Example: example, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return cmd.Help()
	}}
	c.AddCommand(commands...)
	return c
}
