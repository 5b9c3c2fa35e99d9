@echo off
rem start.bat opens the notebooks; start.bat demo trains a LoRA and draws demo.png.
setlocal
cd /d "%~dp0"
for %%p in ("py -3.11" "py -3.12" "py -3.13" "py -3.14" "python" "python3") do (
    %%~p start.py --fits >nul 2>&1 && (
        %%~p start.py %* && exit /b 0
        pause
        exit /b 1
    )
)
echo error: no Python was found that this folder has wheels for; install one of these (system, Python):
type platforms.txt
pause
exit /b 1
